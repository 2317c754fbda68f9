// Modules megakern._C and megakern._simt: one line a function, no logic. A call fills the function's struct (api.h) field
// by field with its arguments, and releases the GIL while C++ checks and launches.
#include <pybind11/pybind11.h>

#include <exception>
#include <limits>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>

#include "api.h"
#if defined(MEGAKERN_SIMT)
#include "simt/simt.h"
#endif

namespace py = pybind11;

namespace {

// Argument `index` of a call of `name`, converted to the type of the field that it initialises.
struct Value {
  PyObject* object;
  const char* name;
  size_t index;

  template <class T, class = std::enable_if_t<std::is_scalar_v<T>>>
  operator T() const {
    if constexpr (std::is_pointer_v<T>) {
      return reinterpret_cast<T>(integer<uintptr_t>());
    } else if constexpr (std::is_enum_v<T>) {
      return T(integer<std::underlying_type_t<T>>());
    } else if constexpr (std::is_floating_point_v<T>) {
      const double number = PyFloat_AsDouble(object);
      require(number != -1.0 || !PyErr_Occurred(), "a float");
      return T(number);
    } else {
      return integer<T>();
    }
  }

 private:
  template <class T>
  T integer() const {
    using Wide = std::conditional_t<std::is_same_v<T, uintptr_t>, unsigned long long, long long>;
    Wide number;
    if constexpr (std::is_unsigned_v<Wide>) {
      number = PyLong_AsUnsignedLongLong(object);
    } else {
      number = PyLong_AsLongLong(object);
    }
    require(number != Wide(-1) || !PyErr_Occurred(), "an integer that fits");
    require(number >= Wide(std::numeric_limits<T>::min()) && number <= Wide(std::numeric_limits<T>::max()),
            "an integer that fits");
    return T(number);
  }

  void require(bool ok, const char* wanted) const {
    if (ok) return;
    PyErr_Clear();
    throw py::value_error(std::string(name) + ": argument " + std::to_string(index) + " must be " + wanted + ", got " +
                          std::string(py::repr(object)));
  }
};

template <size_t>
using Each = Value;

template <class Struct, size_t... I>
auto takes(std::index_sequence<I...>) -> decltype(Struct{std::declval<Each<I>>()...}, std::true_type{});
template <class Struct>
std::false_type takes(...);

// The number of values that Struct{...} takes.
template <class Struct, size_t N = 1>
constexpr size_t fields() {
  if constexpr (decltype(takes<Struct>(std::make_index_sequence<N + 1>()))::value) {
    return fields<Struct, N + 1>();
  } else {
    return N;
  }
}

template <class Struct, size_t... I>
Struct fill(const char* name, PyObject* const* arguments, std::index_sequence<I...>) {
  return Struct{Value{arguments[I], name, I}...};
}

// While it lives, other threads may run Python.
class Unlocked {
 public:
  Unlocked() : state_(PyEval_SaveThread()) {}
  ~Unlocked() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

template <auto launch>
struct Bound;

// A module function that takes the fields of Struct in order, then device and stream. Python calls it as it is: by way of
// pybind11's own functions, which look at arguments that may have names and types, a call takes 0.3 us longer.
template <class Struct, void (*launch)(const Struct&, megakern::Place)>
struct Bound<launch> {
  static constexpr size_t count = fields<Struct>();
  static inline PyMethodDef definition = {};

  static void add(py::module_& module, const char* name, const char* doc) {
    const auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call));
    definition = {name, function, METH_FASTCALL, doc};
    const auto owner = py::reinterpret_borrow<py::object>(module.attr("__name__"));
    module.add_object(name, py::reinterpret_steal<py::object>(PyCFunction_NewEx(&definition, nullptr, owner.ptr())));
  }

  static PyObject* call(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
    const char* name = definition.ml_name;
    try {
      if (given != Py_ssize_t(count + 2)) {
        throw py::type_error(std::string(name) + " takes " + std::to_string(count) +
                             " arguments, then device and stream; got " + std::to_string(given));
      }
      const Struct problem = fill<Struct>(name, arguments, std::make_index_sequence<count>());
      const megakern::Place place{Value{arguments[count], name, count}, Value{arguments[count + 1], name, count + 1}};
      megakern::launching_on(place.device);
      const Unlocked unlocked;
      launch(problem, place);
    } catch (const py::builtin_exception& error) {
      error.set_error();
      return nullptr;
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
      return nullptr;
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
      return nullptr;
    }
    Py_RETURN_NONE;
  }
};

}  // namespace

#define BIND(function, doc) Bound<&megakern::function>::add(m, #function, doc)

PYBIND11_MODULE(MEGAKERN_MODULE, m) {
  m.doc() = "CUDA kernels of megakern, on raw addresses; megakern/kernels/cuda calls them, csrc/api.h has the arguments";
  m.attr("built") = MEGAKERN_BUILT;
  m.def("check_pointers", &megakern::check_pointers, "Whether launches ask where each of their tensors lies.");
  BIND(activation_forward, "y = act(x).");
  BIND(activation_backward, "dx = dy act'(x).");
  BIND(swiglu_forward, "y = silu(gate) up.");
  BIND(swiglu_backward, "dgate = dy up silu'(gate), dup = dy silu(gate).");
  BIND(linear_product, "out (+)= act(A B + bias) + residual.");
  BIND(column_sums, "Sums of the columns of x, in parts.");
  BIND(part_sums, "out = the sum of parts.");
  BIND(cross_entropy_rows, "loss, lse of each row of logits.");
  BIND(cross_entropy_parts, "peaks, sums of each row of logits: this rank's part of its loss.");
  BIND(cross_entropy_shift, "sums in place, from this rank's peaks to the highest of all ranks.");
  BIND(cross_entropy_finish, "loss, lse of each row, from the sums over all ranks.");
  BIND(cross_entropy_gradient, "out = scale d(row loss)/d(logits).");
  BIND(cross_entropy_loss_and_gradient, "loss of each row, and out = scale d(row loss)/d(logits), in one pass.");
  BIND(scale_unless_one, "x = factor x, or nothing where factor is 1.");
  BIND(adamw, "One step of AdamW, in place, for a list of tensors.");
  BIND(sum_of_squares, "out = the sum of the squares of all elements of a list of tensors.");
  BIND(norm_forward, "y = LayerNorm or RMSNorm of x + residual, mean and rstd.");
  BIND(norm_backward, "dx, dweight, dbias.");
  BIND(rope, "q and k, rotated by the angles of their positions.");
  BIND(dropout, "out = x keep / (1 - p) + residual.");
  BIND(attention_forward, "out = softmax(scale q k^T) v, and lse.");
  BIND(attention_backward, "dq, dk, dv of attention.");
  BIND(attention_decode, "out = softmax(scale q k^T) v of few queries over many keys, in one tensor or in pages.");

#if defined(MEGAKERN_SIMT)
  m.def("set_schedule", &megakern::simt::set_schedule, "The order in which threads run; simt/simt.h has the names.");
  m.def("schedule", &megakern::simt::schedule, "The one in use.");
  m.def("pretend_pointer", &megakern::pretend_pointer, "An address plays memory of a device; -1: of the host; 0: none does.");
#endif
}
