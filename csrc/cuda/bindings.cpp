// kto_kernels._cuda, and kto_kernels._cuda_emulation with the same interface: raw pointers, sizes,
// strides and a stream's handle. Arguments are validated by the Python launchers.
#include "../bindings.h"

#include <stdexcept>

#include "launch.h"

namespace py = pybind11;

namespace kto {
#ifdef KTO_EMULATION
extern unsigned emulation_seed;
#endif

namespace {

void bind(py::module_& m) {
  bind_rows(m);

  type<RowSet>(m, "RowSet")
      .def(py::init([](const Rows& rows, uintptr_t logps, uintptr_t maximum, uintptr_t sum,
                       uintptr_t sums, uintptr_t counts) {
             return RowSet{rows,
                           0,
                           pointer<float>(logps),
                           pointer<float>(maximum),
                           pointer<float>(sum),
                           pointer<double>(sums),
                           pointer<double>(counts)};
           }),
           py::kw_only(), py::arg("rows"), py::arg("logps"), py::arg("maximum") = 0,
           py::arg("sum") = 0, py::arg("sums") = 0, py::arg("counts") = 0);

  type<Values>(m, "Values")
      .def(py::init([](uintptr_t data, int type, int64_t stride) {
             return Values{pointer<void>(data), type, stride};
           }),
           py::kw_only(), py::arg("data"), py::arg("type"), py::arg("stride"));

  type<Stages>(m, "Stages")
      .def(py::init([](bool average, int reduction, int64_t n_sequences, int64_t n_kl,
                       uintptr_t logps, uintptr_t counts, const Values& ref_logps,
                       const Values& kl_logps, const Values& kl_ref_logps, const Values& kl,
                       double kl_value, uintptr_t desirable, int64_t desirable_stride, double beta,
                       double desirable_weight, double undesirable_weight, uintptr_t loss,
                       uintptr_t ref_logps_out, uintptr_t rewards, uintptr_t kl_out,
                       uintptr_t coefficients) {
             return Stages{true,
                           average,
                           Reduction(reduction),
                           n_sequences,
                           n_kl,
                           pointer<double>(logps),
                           pointer<double>(counts),
                           ref_logps,
                           kl_logps,
                           kl_ref_logps,
                           kl,
                           kl_value,
                           pointer<bool>(desirable),
                           desirable_stride,
                           {beta, desirable_weight, undesirable_weight},
                           pointer<float>(loss),
                           pointer<double>(ref_logps_out),
                           pointer<float>(rewards),
                           pointer<float>(kl_out),
                           pointer<float>(coefficients)};
           }),
           py::kw_only(), py::arg("average"), py::arg("reduction"), py::arg("n_sequences"),
           py::arg("n_kl"), py::arg("logps"), py::arg("counts"), py::arg("ref_logps"),
           py::arg("kl_logps"), py::arg("kl_ref_logps"), py::arg("kl"), py::arg("kl_value"),
           py::arg("desirable"), py::arg("desirable_stride"), py::arg("beta"),
           py::arg("desirable_weight"), py::arg("undesirable_weight"), py::arg("loss"),
           py::arg("ref_logps_out"), py::arg("rewards"), py::arg("kl_out"),
           py::arg("coefficients"));

  m.def(
      "forward",
      [](const std::vector<RowSet>& sets, const Scale& scale, int splits, uintptr_t shares,
         uintptr_t arrivals, const std::optional<Stages>& stages, int device, uintptr_t stream) {
        if (sets.empty() || sets.size() > kMaxSets)
          throw std::invalid_argument("sets: expected 1 to 4 sets of rows");
        ForwardArguments arguments{};
        for (const RowSet& set : sets) {
          arguments.sets[arguments.n_sets] = set;
          arguments.sets[arguments.n_sets++].first = arguments.n_rows;
          arguments.n_rows += set.rows.n_rows;
        }
        arguments.splits = splits;
        arguments.shares = pointer<Share>(shares);
        arguments.arrivals = pointer<unsigned>(arrivals);
        arguments.scale = scale;
        if (stages) arguments.stages = *stages;
        launch_forward(arguments, {device, pointer<void>(stream)});
      },
      py::kw_only(), py::arg("sets"), py::arg("scale"), py::arg("splits"), py::arg("shares"),
      py::arg("arrivals"), py::arg("stages"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());

  m.def(
      "backward",
      [](const Rows& rows, const Scale& scale, uintptr_t grad, int64_t grad_stride,
         uintptr_t coefficients, uintptr_t logps, uintptr_t maximum, uintptr_t sum, uintptr_t out,
         int64_t out_stride_b, int64_t out_stride_t, int splits, int device, uintptr_t stream) {
        launch_backward({rows,
                         scale,
                         {pointer<float>(grad), grad_stride, pointer<float>(coefficients)},
                         pointer<float>(logps),
                         pointer<float>(maximum),
                         pointer<float>(sum),
                         pointer<void>(out),
                         out_stride_b,
                         out_stride_t,
                         splits},
                        {device, pointer<void>(stream)});
      },
      py::kw_only(), py::arg("rows"), py::arg("scale"), py::arg("grad"), py::arg("grad_stride"),
      py::arg("coefficients"), py::arg("logps"), py::arg("maximum"), py::arg("sum"), py::arg("out"),
      py::arg("out_stride_b"), py::arg("out_stride_t"), py::arg("splits"), py::arg("device"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "score_chunk",
      [](const Rows& rows, const Scale& scale, uintptr_t gradient, uintptr_t logps,
         uintptr_t entropy, uintptr_t mean_logits, uintptr_t is_top1, int device,
         uintptr_t stream) {
        launch_chunk({rows, scale, pointer<void>(gradient), pointer<float>(logps),
                      pointer<float>(entropy), pointer<float>(mean_logits), pointer<bool>(is_top1)},
                     {device, pointer<void>(stream)});
      },
      py::kw_only(), py::arg("rows"), py::arg("scale"), py::arg("gradient"), py::arg("logps"),
      py::arg("entropy"), py::arg("mean_logits"), py::arg("is_top1"), py::arg("device"),
      py::arg("stream"), py::call_guard<py::gil_scoped_release>());

  m.def(
      "multiply",
      [](uintptr_t data, int dtype, int64_t count, const Values& factor, int blocks, int device,
         uintptr_t stream) {
        launch_multiply({pointer<void>(data), DType(dtype), count, factor, blocks},
                        {device, pointer<void>(stream)});
      },
      py::kw_only(), py::arg("data"), py::arg("dtype"), py::arg("count"), py::arg("factor"),
      py::arg("blocks"), py::arg("device"), py::arg("stream"),
      py::call_guard<py::gil_scoped_release>());
}

}  // namespace
}  // namespace kto

#ifdef KTO_EMULATION
PYBIND11_MODULE(_cuda_emulation, m) {
  m.doc() = "The CUDA kernels of kto_kernels, run on the host for tests";
  m.def(
      "set_order", [](unsigned seed) { kto::emulation_seed = seed; }, py::arg("seed"),
      "Shuffles blocks and threads; 0: as they are numbered.");
  kto::bind(m);
}
#else
PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA C++ kernels of kto_kernels";
  kto::bind(m);
}
#endif
