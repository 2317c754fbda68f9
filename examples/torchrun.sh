#!/usr/bin/env bash
# Train over several machines with torchrun. Run the same line on every machine, with its own NODE_RANK:
#
#   NODES=2 NODE_RANK=0 HOST=first-machine bash examples/torchrun.sh CONFIG.toml RUN --parallel.tp 8
#   NODES=2 NODE_RANK=1 HOST=first-machine bash examples/torchrun.sh CONFIG.toml RUN --parallel.tp 8
#
# RUN and the data must be on a file system that all machines share. A run that exists goes on from its newest
# checkpoint: the same lines start it again after a crash. PER_NODE and PORT have defaults: one process a GPU, 29500.
set -euo pipefail

: "${NODES:?number of machines}" "${NODE_RANK:?0 on the first machine, 1 on the second ...}" "${HOST:?name of the first}"
CONFIG=${1:?CONFIG.toml}
RUN=${2:?RUN, a folder that all machines see}
shift 2

what=("$CONFIG" --out "$RUN")
if [ -e "$RUN/config.toml" ]; then
  what=(--resume "$RUN")
fi

exec torchrun \
  --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "${PER_NODE:-gpu}" \
  --master-addr "$HOST" --master-port "${PORT:-29500}" \
  -m megakern train "${what[@]}" "$@"
