// kto_kernels._cuda, and kto_kernels._cuda_emulation with the same interface: a function for each
// launch of launch.h, which takes the members of its structs as dicts. The Python launchers have
// validated them.
#include "../bindings.h"

#include <stdexcept>

#include "launch.h"

namespace py = pybind11;

namespace kto {
#ifdef KTO_EMULATION
extern unsigned emulation_seed;
#endif

template <class F>
void fields(RowSet& set, F&& field) {
  field("rows", set.rows);
  field("logps", set.logps);
  field("origin", set.origin);
  field("sum", set.sum);
  field("sums", set.sums);
  field("counts", set.counts);
}

template <class F>
void fields(Values& values, F&& field) {
  field("data", values.data);
  field("type", values.type);
  field("stride", values.stride);
}

template <class F>
void fields(Stages& stages, F&& field) {
  field("average", stages.average);
  field("reduction", stages.reduction);
  field("n_sequences", stages.n_sequences);
  field("n_kl", stages.n_kl);
  field("logps", stages.logps);
  field("counts", stages.counts);
  field("ref_logps", stages.ref_logps);
  field("kl_logps", stages.kl_logps);
  field("ref_kl_logps", stages.ref_kl_logps);
  field("kl", stages.kl);
  field("kl_value", stages.kl_value);
  field("desirable", stages.desirable);
  field("desirable_stride", stages.desirable_stride);
  field("beta", stages.options.beta);
  field("desirable_weight", stages.options.desirable_weight);
  field("undesirable_weight", stages.options.undesirable_weight);
  field("loss", stages.loss);
  field("ref_logps_out", stages.ref_logps_out);
  field("rewards", stages.rewards);
  field("kl_out", stages.kl_out);
  field("coefficients", stages.coefficients);
}

// The sets of rows and the stages are arguments of their own.
template <class F>
void fields(ForwardArguments& arguments, F&& field) {
  field("scale", arguments.scale);
  field("splits", arguments.splits);
  field("shares", arguments.shares);
  field("arrivals", arguments.arrivals);
}

template <class F>
void fields(BackwardArguments& arguments, F&& field) {
  field("rows", arguments.rows);
  field("scale", arguments.scale);
  field("grad", arguments.gradient.grad);
  field("grad_stride", arguments.gradient.grad_stride);
  field("coefficients", arguments.gradient.coefficients);
  field("logps", arguments.logps);
  field("origin", arguments.origin);
  field("sum", arguments.sum);
  field("out", arguments.out);
  field("out_stride_b", arguments.out_stride_b);
  field("out_stride_t", arguments.out_stride_t);
  field("splits", arguments.splits);
}

template <class F>
void fields(ChunkArguments& arguments, F&& field) {
  field("rows", arguments.rows);
  field("scale", arguments.scale);
  field("gradient", arguments.gradient);
  field("logps", arguments.logps);
  field("entropy", arguments.entropy);
  field("mean_logits", arguments.mean_logits);
  field("is_top1", arguments.is_top1);
}

template <class F>
void fields(MultiplyArguments& arguments, F&& field) {
  field("data", arguments.data);
  field("dtype", arguments.dtype);
  field("count", arguments.count);
  field("factor", arguments.factor);
  field("blocks", arguments.blocks);
}

template <class F>
void fields(SequencesArguments& arguments, F&& field) {
  field("token_logps", arguments.token_logps);
  field("offsets", arguments.offsets);
  field("n_sequences", arguments.n_sequences);
  field("sums", arguments.sums);
  field("average", arguments.average);
  field("counts", arguments.counts);
  field("lengths", arguments.lengths);
  field("ref_logps", arguments.ref_logps);
  field("z0", arguments.z0);
  field("desirable", arguments.desirable);
  field("desirable_stride", arguments.desirable_stride);
  field("beta", arguments.options.beta);
  field("desirable_weight", arguments.options.desirable_weight);
  field("undesirable_weight", arguments.options.undesirable_weight);
  field("reduced_by", arguments.reduced_by);
  field("logps", arguments.logps);
  field("slopes", arguments.slopes);
  field("losses", arguments.losses);
  field("rewards", arguments.rewards);
  field("divisor", arguments.divisor);
  field("factor", arguments.factor);
}

template <class F>
void fields(Target& target, F&& field) {
  field("device", target.device);
  field("stream", target.stream);
}

namespace {

template <class Arguments>
void launch(void (*launcher)(const Arguments&, Target), const Arguments& arguments,
            const py::dict& given) {
  const Target target = filled<Target>(given);
  py::gil_scoped_release released;
  launcher(arguments, target);
}

template <class Arguments>
void bind_launcher(py::module_& m, const char* name, void (*launcher)(const Arguments&, Target)) {
  m.def(name, [launcher](const py::dict& arguments, const py::dict& target) {
    launch(launcher, filled<Arguments>(arguments), target);
  });
}

void bind(py::module_& m) {
  m.def("forward", [](const std::vector<py::dict>& sets, const std::optional<py::dict>& stages,
                      const py::dict& given, const py::dict& target) {
    if (sets.empty() || sets.size() > kMaxSets)
      throw std::invalid_argument("sets: expected 1 to 4 sets of rows");
    auto arguments = filled<ForwardArguments>(given);
    for (const py::dict& set : sets) {
      RowSet& next = arguments.sets[arguments.n_sets++] = filled<RowSet>(set);
      next.first = arguments.n_rows;
      arguments.n_rows += next.rows.n_rows;
    }
    if (stages) {
      arguments.stages = filled<Stages>(*stages);
      arguments.stages.wanted = true;
    }
    launch(launch_forward, arguments, target);
  });
  bind_launcher(m, "backward", launch_backward);
  bind_launcher(m, "score_chunk", launch_chunk);
  bind_launcher(m, "multiply", launch_multiply);
  bind_launcher(m, "sequences", launch_sequences);
}

}  // namespace
}  // namespace kto

#ifdef KTO_EMULATION
PYBIND11_MODULE(_cuda_emulation, m) {
  m.doc() = "The CUDA kernels of kto_kernels, run on the host for tests";
  m.def(
      "set_order", [](unsigned seed) { kto::emulation_seed = seed; }, py::arg("seed"),
      "Seeds the order of blocks and threads; 0 leaves them in the order of their numbers.");
  kto::bind(m);
}
#else
PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA C++ kernels of kto_kernels";
  kto::bind(m);
}
#endif
