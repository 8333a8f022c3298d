// kto_kernels._cpu: raw pointers, sizes and strides, so that the build needs no torch and one build
// serves every torch version. Arguments are validated by the Python launchers.
#include "../bindings.h"

#include "engine.h"

namespace py = pybind11;
using kto::pointer;

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels of kto_kernels for the CPU";

  kto::bind_rows(m);

  m.def("instruction_sets", &kto::instruction_sets);
  m.def("instruction_set", [] { return std::string(kto::kernels().name); });

  m.def("find_openmp", &kto::find_openmp, py::arg("torch_library"));

  m.def(
      "advise_huge_pages",
      [](uintptr_t data, size_t bytes) { kto::advise_huge_pages(pointer<void>(data), bytes); },
      py::kw_only(), py::arg("data"), py::arg("bytes"));

  m.def(
      "token_logps_forward",
      [](const kto::Rows& rows, const kto::Scale& scale, uintptr_t logps, uintptr_t reference,
         uintptr_t sum, int threads) {
        kto::token_logps_forward(
            rows, scale, {pointer<float>(logps), pointer<float>(reference), pointer<float>(sum)},
            threads);
      },
      py::kw_only(), py::arg("rows"), py::arg("scale"), py::arg("logps"), py::arg("reference"),
      py::arg("sum"), py::arg("threads"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "logits_backward",
      [](const kto::Rows& rows, const kto::Scale& scale, uintptr_t grad, int64_t grad_stride,
         uintptr_t coefficients, uintptr_t logps, uintptr_t reference, uintptr_t sum,
         uintptr_t output, int64_t output_stride_b, int64_t output_stride_t, int threads) {
        kto::logits_backward(
            rows, scale, {pointer<float>(grad), grad_stride, pointer<float>(coefficients)},
            {pointer<float>(logps), pointer<float>(reference), pointer<float>(sum)},
            {pointer<void>(output), output_stride_b, output_stride_t}, threads);
      },
      py::kw_only(), py::arg("rows"), py::arg("scale"), py::arg("grad"), py::arg("grad_stride"),
      py::arg("coefficients"), py::arg("logps"), py::arg("reference"), py::arg("sum"),
      py::arg("output"), py::arg("output_stride_b"), py::arg("output_stride_t"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "score_chunk",
      [](const kto::Rows& rows, const kto::Scale& scale, uintptr_t logps, uintptr_t entropy,
         uintptr_t mean_logits, uintptr_t is_top1, uintptr_t gradient, int threads) {
        kto::score_chunk(rows, scale,
                         {pointer<float>(logps), pointer<float>(entropy),
                          pointer<float>(mean_logits), pointer<bool>(is_top1)},
                         pointer<void>(gradient), threads);
      },
      py::kw_only(), py::arg("rows"), py::arg("scale"), py::arg("logps"), py::arg("entropy"),
      py::arg("mean_logits"), py::arg("is_top1"), py::arg("gradient"), py::arg("threads"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "sequence_logps",
      [](const kto::Rows& rows, uintptr_t logps, bool average, uintptr_t sums, uintptr_t counts) {
        kto::sequence_logps(rows, pointer<float>(logps), average, pointer<double>(sums),
                            pointer<int64_t>(counts));
      },
      py::kw_only(), py::arg("rows"), py::arg("logps"), py::arg("average"), py::arg("sums"),
      py::arg("counts"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "sequence_stages",
      [](int64_t n_sequences, uintptr_t logps, uintptr_t ref_logps, uintptr_t desirable,
         uintptr_t counts, bool average, int64_t n_kl, uintptr_t kl_logps, uintptr_t ref_kl_logps,
         double kl, double beta, double desirable_weight, double undesirable_weight, int reduction,
         uintptr_t loss, uintptr_t rewards, uintptr_t kl_out, uintptr_t coefficients) {
        kto::sequence_stages({n_sequences, pointer<double>(logps), pointer<double>(ref_logps),
                              pointer<bool>(desirable), pointer<int64_t>(counts), average},
                             {n_kl, pointer<double>(kl_logps), pointer<double>(ref_kl_logps), kl},
                             {beta, desirable_weight, undesirable_weight},
                             kto::Reduction(reduction),
                             {pointer<float>(loss), pointer<float>(rewards), pointer<float>(kl_out),
                              pointer<float>(coefficients)});
      },
      py::kw_only(), py::arg("n_sequences"), py::arg("logps"), py::arg("ref_logps"),
      py::arg("desirable"), py::arg("counts"), py::arg("average"), py::arg("n_kl"),
      py::arg("kl_logps"), py::arg("ref_kl_logps"), py::arg("kl"), py::arg("beta"),
      py::arg("desirable_weight"), py::arg("undesirable_weight"), py::arg("reduction"),
      py::arg("loss"), py::arg("rewards"), py::arg("kl_out"), py::arg("coefficients"),
      py::call_guard<py::gil_scoped_release>());
}
