// How structs get from Python to the extension modules: as dicts of numbers, tensors as their
// addresses. The modules know nothing of torch, so that one build serves every torch version.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <type_traits>
#include <vector>

#include "rows.h"

namespace kto {

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// For each struct there is a function `fields(value, field)`, which calls field(name, member) for
// every member. Nothing else needs to be written to take the struct from Python.
template <class T>
concept HasFields = requires(T& value) { fields(value, [](const char*, auto&) {}); };

template <class T>
T filled(const py::dict& given);

// Unlike cast<py::dict>(), which also converts other objects to dicts.
inline py::dict as_dict(py::handle value) {
  if (!py::isinstance<py::dict>(value)) throw py::cast_error("expected a dict");
  return py::reinterpret_borrow<py::dict>(value);
}

template <class Member>
void assign(Member& member, py::handle value) {
  if constexpr (std::is_pointer_v<Member>)
    member = reinterpret_cast<Member>(value.cast<uintptr_t>());
  else if constexpr (std::is_enum_v<Member>)
    member = Member(value.cast<int>());
  else if constexpr (HasFields<Member>)
    member = filled<Member>(as_dict(value));
  else
    member = value.cast<Member>();
}

// Makes a struct of a dict, which must hold every field and no other.
template <class T>
T filled(const py::dict& given) {
  T value{};
  static const std::vector<PyObject*> names = [&] {
    std::vector<PyObject*> interned;
    fields(value,
           [&](const char* name, auto&) { interned.push_back(PyUnicode_InternFromString(name)); });
    return interned;
  }();
  size_t count = 0;
  fields(value, [&](const char* name, auto& member) {
    PyObject* found = PyDict_GetItemWithError(given.ptr(), names[count++]);
    if (found == nullptr) throw py::type_error(std::string(name) + " is missing");
    try {
      assign(member, py::handle(found));
    } catch (const py::cast_error& error) {
      throw py::type_error(std::string(name) + ": " + error.what());
    }
  });
  if (given.size() == count) return value;
  const auto unknown = py::reinterpret_steal<py::dict>(PyDict_Copy(given.ptr()));
  for (PyObject* name : names) PyDict_DelItem(unknown.ptr(), name);
  throw py::type_error("unknown fields: " + std::string(py::str(unknown)));
}

template <class F>
void fields(Rows& rows, F&& field) {
  field("logits", rows.logits);
  field("dtype", rows.dtype);
  field("n_rows", rows.n_rows);
  field("n_sequences", rows.n_sequences);
  field("tokens", rows.tokens);
  field("vocab", rows.vocab);
  field("logits_stride_b", rows.logits_stride_b);
  field("logits_stride_t", rows.logits_stride_t);
  field("labels", rows.labels.data);
  field("labels_int64", rows.labels.is_int64);
  field("labels_stride_b", rows.labels_stride_b);
  field("labels_stride_t", rows.labels_stride_t);
  field("cu_seqlens", rows.cu_seqlens.data);
  field("cu_seqlens_int64", rows.cu_seqlens.is_int64);
  field("ignore_index", rows.ignore_index);
  field("shift", rows.shift);
}

// The fields of kto_kernels.options.Scale, from which the C++ Scale is computed.
struct ScaleOptions {
  double logit_scale;
  std::optional<double> softcap;
  double temperature;
};

template <class F>
void fields(ScaleOptions& options, F&& field) {
  field("logit_scale", options.logit_scale);
  field("softcap", options.softcap);
  field("temperature", options.temperature);
}

inline Scale scale_from(const py::dict& given) {
  const auto [logit_scale, softcap, temperature] = filled<ScaleOptions>(given);
  const float slope = float(logit_scale / temperature);
  if (!softcap) return {1.0f, slope, slope, false};
  return {float(logit_scale / *softcap), float(*softcap / temperature), slope, true};
}

inline void assign(Scale& scale, py::handle value) { scale = scale_from(as_dict(value)); }

}  // namespace kto
