"""`megakern verify`: proof on the user's own machine that the layout does not change the result.

The model is trained for a few steps by one process in fp32 on the `torch` backend: the reference. Then it is trained
again under each layout, precision and backend, by the Trainer of `megakern train` in fresh processes, and losses,
gradients and weights are compared. plan.py decides what is trained, worker.py trains and compares, tolerances.py has
the bounds, report.py the table.
"""
