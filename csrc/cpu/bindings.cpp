// Module megakern._cpu: one line a function, no logic. Every call releases the GIL.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "api.h"
#include "attention.h"
#include "block_step.h"
#include "shared.h"

namespace py = pybind11;
using unlocked = py::call_guard<py::gil_scoped_release>;

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels of megakern for CPUs, on raw addresses; megakern/kernels/torch/native.py calls them";
  m.attr("interface") = megakern::kInterface;
  m.def("features", &megakern::features, "Instruction sets of this processor that kernels here use.");
  m.def("linear_epilogue", &megakern::linear_epilogue, unlocked(), "y = act(z + bias) + residual, pre = z + bias.");
  m.def("column_sum", &megakern::column_sum, unlocked(), "Sums over rows, in fp32.");
  m.def("linear", &megakern::linear, unlocked(), "y = act(x weight^T + bias) + residual on AMX.");
  m.def("linear_rows", &megakern::linear_rows, unlocked(), "y = act(x weight^T + bias) + residual for a few rows.");
  m.def("block_step", &megakern::block_step, unlocked(), "A transformer block over a few new tokens and a cache.");
  m.def("use_huge_pages", &megakern::use_huge_pages, unlocked(), "Puts a tensor into pages of 2 MB.");
  m.def("weight_gradient", &megakern::weight_gradient, unlocked(), "out (+)= dy^T x on AMX.");
  m.def("activation_backward", &megakern::activation_backward, unlocked(), "dx = dy act'(x).");
  m.def("cross_entropy_sums", &megakern::cross_entropy_sums, unlocked(), "Maximum and sums of each row.");
  m.def("cross_entropy_gradient", &megakern::cross_entropy_gradient, unlocked(), "Gradient of the logits.");
  m.def("norm_forward", &megakern::norm_forward, unlocked(), "LayerNorm or RMSNorm of x + residual.");
  m.def("norm_backward", &megakern::norm_backward, unlocked(), "dx, dweight, dbias.");
  m.def("adamw", &megakern::adamw, unlocked(), "One step of AdamW, over many tensors in place.");
  m.def("sum_of_squares", &megakern::sum_of_squares, unlocked(), "Of all elements of many tensors, in fp64.");
  m.def("attention_forward", &megakern::attention_forward, unlocked(), "out and lse.");
  m.def("attention_backward", &megakern::attention_backward, unlocked(), "dq, dk, dv.");

  using namespace megakern;
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
