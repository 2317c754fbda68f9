// Module megakern._cpu: one line a function, no logic. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "attention.h"
#include "block_step.h"
#include "shared.h"

namespace py = pybind11;
using unlocked = py::call_guard<py::gil_scoped_release>;

namespace {

// A kernel, for processors that have what it needs.
template <class R, class... A>
void bind(py::module_& m, const char* name, megakern::Feature needed, R (*kernel)(A...), const char* doc) {
  const auto checked = [name, needed, kernel](A... arguments) {
    megakern::require_feature(name, needed);
    return kernel(arguments...);
  };
  m.def(name, checked, unlocked(), doc);
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
  using namespace megakern;
  m.doc() = "C++ kernels of megakern for CPUs, on raw addresses; megakern/kernels/torch/native.py calls them";
  m.attr("interface") = kInterface;
  m.def("features", &features, "Instruction sets of this processor that kernels here use.");
  m.def("limit_features", &limit_features, "For tests: as on a processor with but the first so many of them.");
  bind(m, "linear_epilogue", kAvx512, &linear_epilogue, "y = act(z + bias) + residual, pre = z + bias.");
  bind(m, "column_sum", kAvx512, &column_sum, "Sums over rows, in fp32.");
  bind(m, "linear", kTilesOfBFloat16, &linear, "y = act(x weight^T + bias) + residual on AMX.");
  bind(m, "linear_rows", kAvx512, &linear_rows, "y = act(x weight^T + bias) + residual for a few rows.");
  bind(m, "block_step", kAvx512, &block_step, "A transformer block over a few new tokens and a cache.");
  m.def("use_huge_pages", &use_huge_pages, unlocked(), "Puts a tensor into pages of 2 MB.");
  bind(m, "weight_gradient", kTilesOfBFloat16, &weight_gradient, "out (+)= dy^T x on AMX.");
  bind(m, "activation_backward", kAvx512, &activation_backward, "dx = dy act'(x).");
  bind(m, "cross_entropy_sums", kAvx512, &cross_entropy_sums, "Maximum and sums of each row.");
  bind(m, "cross_entropy_gradient", kAvx512, &cross_entropy_gradient, "Gradient of the logits.");
  bind(m, "norm_forward", kAvx512, &norm_forward, "LayerNorm or RMSNorm of x + residual.");
  bind(m, "norm_backward", kAvx512, &norm_backward, "dx, dweight, dbias.");
  bind(m, "adamw", kAvx512, &adamw, "One step of AdamW, over many tensors in place.");
  bind(m, "sum_of_squares", kAvx512, &sum_of_squares, "Of all elements of many tensors, in fp64.");
  bind(m, "attention_forward", kAvx512, &attention_forward, "out and lse; products in bf16 need more.");
  bind(m, "attention_backward", kAvx512, &attention_backward, "dq, dk, dv; products in bf16 need more.");

  py::class_<LinearProblem>(m, "LinearProblem", py::module_local())
      .def(py::init([](int64_t M, int64_t N, int64_t K, int64_t x_stride, int weight_dtype, bool transposed,
                       int activation, bool derivative, int threads) {
        return LinearProblem{M, N, K, x_stride, weight_dtype, transposed, activation, derivative, threads};
      }));
  py::class_<LinearRowsProblem>(m, "LinearRowsProblem", py::module_local())
      .def(py::init([](int64_t M, int64_t N, int64_t K, int64_t x_stride, int dtype, int weight_dtype, int bias_dtype,
                       int activation, int threads) {
        return LinearRowsProblem{M, N, K, x_stride, dtype, weight_dtype, bias_dtype, activation, threads};
      }));
  py::class_<WeightGradientProblem>(m, "WeightGradientProblem", py::module_local())
      .def(py::init([](int64_t M, int64_t N, int64_t K, int64_t dy_stride, int64_t x_stride, int dtype, bool add,
                       int threads) {
        return WeightGradientProblem{M, N, K, dy_stride, x_stride, dtype, add, threads};
      }));
  py::class_<AdamwProblem>(m, "AdamwProblem", py::module_local())
      .def(py::init([](int param_dtype, int grad_dtype, int moment_dtype, int master, float scale, float decay,
                       float beta1, float one_beta1, float beta2, float one_beta2, float step_size, float correction,
                       float eps, bool zero_grads, int threads) {
        return AdamwProblem{param_dtype, grad_dtype, moment_dtype, master,    scale,      decay, beta1,  one_beta1,
                            beta2,       one_beta2,  step_size,    correction, eps,       zero_grads, threads};
      }));
  py::class_<AdamwTensors>(m, "AdamwTensors", py::module_local())
      .def(py::init([](Address param, Address grad, Address exp_avg, Address exp_avg_sq, Address master,
                       int64_t elements) {
        return AdamwTensors{param, grad, exp_avg, exp_avg_sq, master, elements};
      }));
  py::class_<Elements>(m, "Elements", py::module_local()).def(py::init([](Address data, int64_t count, int dtype) {
    return Elements{data, count, dtype};
  }));
  py::class_<AttentionTensor>(m, "AttentionTensor", py::module_local())
      .def(py::init([](Address data, int64_t by_sample, int64_t by_row, int64_t by_head) {
        return AttentionTensor{data, by_sample, by_row, by_head};
      }));
  py::class_<AttentionProblem>(m, "AttentionProblem", py::module_local())
      .def(py::init([](int64_t B, int64_t T, int64_t S, int64_t H, int64_t Hkv, int64_t D, int64_t left, int64_t right,
                       float scale, double dropout_p, int32_t threshold, uint64_t seed, int64_t sample, int64_t head,
                       int threads) {
        return AttentionProblem{B, T, S, H, Hkv, D, left, right, scale, dropout_p, threshold, seed, sample, head,
                                threads};
      }));
  py::class_<BlockNorm>(m, "BlockNorm", py::module_local()).def(py::init([](Address weight, Address bias) {
    return BlockNorm{weight, bias};
  }));
  py::class_<BlockLinear>(m, "BlockLinear", py::module_local()).def(py::init([](Address weight, Address bias) {
    return BlockLinear{weight, bias};
  }));
  py::class_<BlockShape>(m, "BlockShape", py::module_local())
      .def(py::init([](int64_t B, int64_t T, int64_t C, int64_t H, int64_t G, int64_t D, int64_t F, bool centre,
                       bool parallel_residual, bool gated, int activation, int64_t window, float eps, float head_eps) {
        return BlockShape{B, T, C, H, G, D, F, centre, parallel_residual, gated, activation, window, eps, head_eps};
      }));
  py::class_<BlockWeights>(m, "BlockWeights", py::module_local())
      .def(py::init([](BlockNorm norm1, BlockNorm norm2, BlockNorm q_norm, BlockNorm k_norm, BlockLinear qkv,
                       BlockLinear proj, BlockLinear fc1, BlockLinear up, BlockLinear fc2) {
        return BlockWeights{norm1, norm2, q_norm, k_norm, qkv, proj, fc1, up, fc2};
      }));
  py::class_<BlockCache>(m, "BlockCache", py::module_local())
      .def(py::init([](Address keys, Address values, Address block_table, Address lengths, int64_t pages,
                       int64_t page_size, int64_t P) {
        return BlockCache{keys, values, block_table, lengths, pages, page_size, P};
      }));
  py::class_<BlockRope>(m, "BlockRope", py::module_local())
      .def(py::init([](Address cos, Address sin, int64_t positions) { return BlockRope{cos, sin, positions}; }));
  py::class_<AttentionForward>(m, "AttentionForward", py::module_local())
      .def(py::init([](AttentionTensor q, AttentionTensor k, AttentionTensor v, Address out, Address lse) {
        return AttentionForward{q, k, v, out, lse};
      }));
  py::class_<AttentionBackward>(m, "AttentionBackward", py::module_local())
      .def(py::init([](AttentionTensor dout, AttentionTensor q, AttentionTensor k, AttentionTensor v,
                       AttentionTensor out, Address lse, AttentionTensor dq, AttentionTensor dk, AttentionTensor dv) {
        return AttentionBackward{dout, q, k, v, out, lse, dq, dk, dv};
      }));
#if defined(__linux__)
  py::class_<SharedChannel>(m, "SharedChannel", py::module_local())
      .def(py::init<int, int, int, int, int64_t, int64_t>(), "Of an open file, which it closes.")
      .def_static("bytes", &SharedChannel::bytes, "How large the file must be.")
      .def("start", &SharedChannel::start, unlocked(), "Begins a collective, and returns its number.")
      .def("finish", &SharedChannel::finish, unlocked(), "Goes on with it, and returns how it stands.");
#endif
}
