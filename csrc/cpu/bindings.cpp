// kto_kernels._cpu: functions that take the members of structs as dicts. The Python launchers have
// validated them.
#include "../bindings.h"

#include "engine.h"

namespace py = pybind11;

namespace kto {
namespace {

// One set of logits, what is told of its rows, and of its sequences where `sums` is not null.
struct RowSet {
  Rows rows;
  RowStatistics statistics;
  double* sums;
  int64_t* counts;
};

struct Stages {
  SequenceInputs sequences;
  KLInputs kl;
  ValueOptions options;
  Reduction reduction;
  SequenceOutputs out;
};

struct BackwardArguments {
  Rows rows;
  Scale scale;
  Gradient gradient;
  RowStatistics statistics;
  Destination out;
};

struct ChunkArguments {
  Rows rows;
  Scale scale;
  ChunkScores scores;
  void* gradient;
};

template <class F>
void fields(RowSet& set, F&& field) {
  field("rows", set.rows);
  field("logps", set.statistics.logps);
  field("origin", set.statistics.origin);
  field("sum", set.statistics.sum);
  field("sums", set.sums);
  field("counts", set.counts);
}

template <class F>
void fields(Stages& stages, F&& field) {
  field("average", stages.sequences.average);
  field("reduction", stages.reduction);
  field("n_sequences", stages.sequences.n_sequences);
  field("n_kl", stages.kl.n_sequences);
  field("logps", stages.sequences.logps);
  field("counts", stages.sequences.counts);
  field("ref_logps", stages.sequences.ref_logps);
  field("kl_logps", stages.kl.logps);
  field("ref_kl_logps", stages.kl.ref_logps);
  field("kl", stages.kl.kl);
  field("desirable", stages.sequences.desirable);
  field("beta", stages.options.beta);
  field("desirable_weight", stages.options.desirable_weight);
  field("undesirable_weight", stages.options.undesirable_weight);
  field("loss", stages.out.loss);
  field("rewards", stages.out.rewards);
  field("kl_out", stages.out.kl);
  field("coefficients", stages.out.coefficients);
}

template <class F>
void fields(BackwardArguments& arguments, F&& field) {
  field("rows", arguments.rows);
  field("scale", arguments.scale);
  field("grad", arguments.gradient.grad);
  field("grad_stride", arguments.gradient.grad_stride);
  field("coefficients", arguments.gradient.coefficients);
  field("logps", arguments.statistics.logps);
  field("origin", arguments.statistics.origin);
  field("sum", arguments.statistics.sum);
  field("out", arguments.out.data);
  field("out_stride_b", arguments.out.stride_b);
  field("out_stride_t", arguments.out.stride_t);
}

template <class F>
void fields(ChunkArguments& arguments, F&& field) {
  field("rows", arguments.rows);
  field("scale", arguments.scale);
  field("logps", arguments.scores.logps);
  field("entropy", arguments.scores.entropy);
  field("mean_logits", arguments.scores.mean_logits);
  field("is_top1", arguments.scores.is_top1);
  field("gradient", arguments.gradient);
}

// The sets' token log-probabilities and sums, and the stages behind them where they are wanted.
void forward(const std::vector<RowSet>& sets, const Scale& scale, const Stages* stages,
             int threads) {
  for (const RowSet& set : sets) {
    token_logps_forward(set.rows, scale, set.statistics, threads);
    if (set.sums != nullptr)
      sequence_logps(set.rows, set.statistics.logps, stages && stages->sequences.average, set.sums,
                     set.counts);
  }
  if (stages)
    sequence_stages(stages->sequences, stages->kl, stages->options, stages->reduction, stages->out);
}

}  // namespace
}  // namespace kto

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "C++ kernels of kto_kernels for the CPU";

  m.def("instruction_sets", &kto::instruction_sets);
  m.def("instruction_set", [] { return std::string(kto::kernels().name); });

  m.def("find_openmp", &kto::find_openmp, py::arg("torch_library"));

  m.def("advise_huge_pages", [](uintptr_t data, size_t bytes) {
    kto::advise_huge_pages(kto::pointer<void>(data), bytes);
  });

  m.def("has_outside_label",
        [](uintptr_t labels, bool is_int64, int64_t n_rows, int64_t tokens, int64_t stride_b,
           int64_t stride_t, int64_t vocab, int64_t ignore_index) {
          kto::Rows rows{};
          rows.labels = {kto::pointer<void>(labels), is_int64};
          rows.n_rows = n_rows, rows.tokens = tokens, rows.vocab = vocab;
          rows.labels_stride_b = stride_b, rows.labels_stride_t = stride_t;
          rows.ignore_index = ignore_index;
          return kto::has_outside_label(rows);
        });

  m.def("forward", [](const std::vector<py::dict>& given_sets, const py::dict& scale,
                      const std::optional<py::dict>& given_stages, int threads) {
    std::vector<kto::RowSet> sets;
    for (const py::dict& set : given_sets) sets.push_back(kto::filled<kto::RowSet>(set));
    std::optional<kto::Stages> stages;
    if (given_stages) stages = kto::filled<kto::Stages>(*given_stages);
    const kto::Scale scaled = kto::scale_from(scale);
    py::gil_scoped_release released;
    kto::forward(sets, scaled, stages ? &*stages : nullptr, threads);
  });

  m.def("value_stages", [](int64_t n_sequences, uintptr_t logps, uintptr_t ref_logps,
                           uintptr_t desirable, double z0, double beta, double desirable_weight,
                           double undesirable_weight, uintptr_t losses, uintptr_t slopes,
                           uintptr_t rewards) {
    using kto::pointer;
    kto::value_stages({n_sequences, pointer<double>(logps), pointer<double>(ref_logps),
                       pointer<bool>(desirable), nullptr, false},
                      z0, {beta, desirable_weight, undesirable_weight},
                      {pointer<double>(losses), pointer<double>(slopes), pointer<double>(rewards)});
  });

  m.def("logits_backward", [](const py::dict& given, int threads) {
    const auto arguments = kto::filled<kto::BackwardArguments>(given);
    py::gil_scoped_release released;
    kto::logits_backward(arguments.rows, arguments.scale, arguments.gradient, arguments.statistics,
                         arguments.out, threads);
  });

  m.def("score_chunk", [](const py::dict& given, int threads) {
    const auto arguments = kto::filled<kto::ChunkArguments>(given);
    py::gil_scoped_release released;
    kto::score_chunk(arguments.rows, arguments.scale, arguments.scores, arguments.gradient,
                     threads);
  });
}
