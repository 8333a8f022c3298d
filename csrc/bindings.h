// What every extension module binds: addresses, Rows and Scale. No torch: raw pointers, sizes and
// strides, so that one build serves every torch version.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "rows.h"

namespace kto {

namespace py = pybind11;

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// Types are module_local: several extensions bind the same ones.
template <class T>
py::class_<T> type(py::module_& m, const char* name) {
  return py::class_<T>(m, name, py::module_local());
}

inline void bind_rows(py::module_& m) {
  type<Rows>(m, "Rows").def(
      py::init([](uintptr_t logits, int dtype, int64_t n_rows, int64_t n_sequences, int64_t tokens,
                  int64_t vocab, int64_t logits_stride_b, int64_t logits_stride_t, uintptr_t labels,
                  bool labels_int64, int64_t labels_stride_b, int64_t labels_stride_t,
                  uintptr_t cu_seqlens, bool cu_seqlens_int64, int64_t ignore_index, bool shift) {
        return Rows{pointer<void>(logits),
                    DType(dtype),
                    n_rows,
                    n_sequences,
                    tokens,
                    vocab,
                    logits_stride_b,
                    logits_stride_t,
                    {pointer<void>(labels), labels_int64},
                    labels_stride_b,
                    labels_stride_t,
                    {pointer<void>(cu_seqlens), cu_seqlens_int64},
                    ignore_index,
                    shift};
      }),
      py::kw_only(), py::arg("logits"), py::arg("dtype"), py::arg("n_rows"), py::arg("n_sequences"),
      py::arg("tokens"), py::arg("vocab"), py::arg("logits_stride_b"), py::arg("logits_stride_t"),
      py::arg("labels"), py::arg("labels_int64"), py::arg("labels_stride_b"),
      py::arg("labels_stride_t"), py::arg("cu_seqlens"), py::arg("cu_seqlens_int64"),
      py::arg("ignore_index"), py::arg("shift"));

  type<Scale>(m, "Scale")
      .def(py::init([](double logit_scale, std::optional<double> softcap, double temperature) {
             const float slope = float(logit_scale / temperature);
             if (!softcap) return Scale{1.0f, slope, slope, false};
             return Scale{float(logit_scale / *softcap), float(*softcap / temperature), slope,
                          true};
           }),
           py::kw_only(), py::arg("logit_scale"), py::arg("softcap"), py::arg("temperature"));
}

}  // namespace kto
