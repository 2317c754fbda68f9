// Module megakern._cpu: one line a function, no logic. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"

namespace py = pybind11;
using unlocked = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels of megakern for CPUs, on raw addresses; megakern/kernels/torch/native.py calls them";
  m.def("features", &megakern::features, "Instruction sets of this processor that kernels here use.");
  m.def("linear_epilogue", &megakern::linear_epilogue, unlocked(), "y = act(z + bias) + residual, pre = z + bias.");
  m.def("column_sum", &megakern::column_sum, unlocked(), "Sums over rows, in fp32.");
  m.def("activation_backward", &megakern::activation_backward, unlocked(), "dx = dy act'(x).");
}
