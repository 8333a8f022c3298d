// The entry points of csrc/cpu/engine.h on random problems, in every instruction set of the
// machine. Nothing is read or written outside of the buffers, every result is near fp64's, and the
// bits depend neither on the number of threads nor on where a result is written.
#include "../../csrc/cpu/engine.h"
#include "problem.h"

using namespace fuzz;

namespace {

struct Statistics {
  Buffer<float> logps, origin, sum;
  explicit Statistics(int64_t n) : logps(n), origin(n), sum(n) {}
  bool operator==(const Statistics& other) const {
    return logps == other.logps && origin == other.origin && sum == other.sum;
  }
};

void run(Choices& choices) {
  const DType dtype = choices.of({DType::f32, DType::f16, DType::bf16});
  const int64_t vocab = any_vocabulary(choices);
  const Layout layout = Layout::of(choices, 3, 4);
  const Problem problem(choices, layout, dtype, vocab);
  const kto::Rows& rows = problem.rows;
  const kto::Scale scale = any_scale(choices);
  const int threads = 1 + int(choices.below(4));

  Statistics statistics(rows.n_rows), again(rows.n_rows);
  kto::token_logps_forward(
      rows, scale, {statistics.logps.data(), statistics.origin.data(), statistics.sum.data()},
      threads);
  kto::token_logps_forward(rows, scale, {again.logps.data(), again.origin.data(), again.sum.data()},
                           1);
  CHECK(statistics == again, "%d threads", threads);

  // Sequences and the loss.
  const bool average = choices.one_in(2);
  Buffer<double> sums(rows.n_sequences);
  Buffer<int64_t> counts(rows.n_sequences);
  kto::sequence_logps(rows, statistics.logps.data(), average, sums.data(), counts.data());
  const auto reduction = kto::Reduction(choices.below(3));
  Buffer<bool> desirable(rows.n_sequences);
  for (int64_t i = 0; i < rows.n_sequences; ++i) desirable[i] = choices.one_in(2);
  Buffer<float> loss(reduction == kto::Reduction::none ? rows.n_sequences : 1),
      rewards(rows.n_sequences), kl(1), coefficients(rows.n_sequences);
  const bool own_kl = choices.one_in(2), reference = choices.one_in(2);
  kto::sequence_stages({rows.n_sequences, sums.data(), reference ? sums.data() : nullptr,
                        desirable.data(), counts.data(), average},
                       {rows.n_sequences, own_kl ? sums.data() : nullptr, nullptr, 0.5},
                       {0.1, 1.5, 0.5}, reduction,
                       {loss.data(), rewards.data(), kl.data(), coefficients.data()});
  for (int64_t i = 0; i < rows.n_sequences; ++i) {
    CHECK(counts[i] >= 0 && counts[i] <= rows.n_rows, "%ld scored", long(counts[i]));
    if (reference && isfinite(sums[i])) CHECK(rewards[i] == 0, "reward %g", double(rewards[i]));
    if (reduction == kto::Reduction::none && isfinite(sums[i]) && !isnan(kl[0]))
      CHECK(loss[i] >= 0 && loss[i] <= 1.5f, "loss %g", double(loss[i]));
  }

  // The gradient from above is given for each token, for each sequence, or once for all. The
  // backward writes to a new buffer and over the logits.
  const bool per_sequence = choices.one_in(2) && rows.n_sequences > 0;
  const int64_t grads = per_sequence ? rows.n_sequences : rows.n_rows;
  const int64_t stride = choices.one_in(3) ? 0 : 1;
  Buffer<float> grad(stride == 0 ? 1 : grads);
  for (int64_t i = 0; i < (stride == 0 ? 1 : grads); ++i)
    grad[i] = choices.one_in(5) ? 0.0f : choices.normal();
  const kto::Gradient gradient{grad.data(), stride, per_sequence ? coefficients.data() : nullptr};
  const kto::RowStatistics saved{statistics.logps.data(), statistics.origin.data(),
                                 statistics.sum.data()};
  Buffer<uint8_t> packed(rows.n_rows * vocab * problem.size,
                         choices.below(16 / problem.size) * problem.size);
  kto::logits_backward(rows, scale, gradient, saved, {packed.data(), rows.tokens * vocab, vocab},
                       threads);
  Buffer<uint8_t> over(problem.logits);
  kto::Rows moved = rows;
  moved.logits = over.data();
  kto::logits_backward(moved, scale, gradient, saved,
                       {over.data(), rows.logits_stride_b, rows.logits_stride_t}, threads);
  problem.check_gaps(over);
  for (int64_t n = 0; n < rows.n_rows; ++n) {
    const uint8_t* found = packed.data() + n * vocab * problem.size;
    CHECK(memcmp(found, over.data() + kto::logits_offset(rows, n) * problem.size,
                 size_t(vocab * problem.size)) == 0,
          "row %ld in place", long(n));
    const int64_t label = kto::label_of(rows, n);
    if (label < 0) {
      CHECK(statistics.logps[n] == 0, "row %ld is not scored: %g", long(n),
            double(statistics.logps[n]));
      for (int64_t i = 0; i < vocab * problem.size; ++i)
        CHECK(found[i] == 0, "row %ld is not scored", long(n));
      continue;
    }
    const Row row = exact_row(problem, n, label, scale);
    check_logp(row, statistics.logps[n], n);
    const float g = kto::gradient_of(gradient, rows, n);
    if (isfinite(g)) check_gradient(row, found, g, rows, scale, n);
  }

  // A chunk, forward and backward in one call.
  const Problem chunk(choices, Layout::of_one(choices.below(9)), dtype, vocab, true);
  const int64_t count = chunk.rows.n_rows;
  Buffer<uint8_t> turned(chunk.logits);
  moved = chunk.rows;
  moved.logits = turned.data();
  const bool outputs = choices.one_in(2), overwrite = !choices.one_in(4);
  Buffer<float> logps(count), entropy(count), mean(count);
  Buffer<bool> top1(count);
  kto::score_chunk(moved, scale,
                   {logps.data(), outputs ? entropy.data() : nullptr,
                    outputs ? mean.data() : nullptr, outputs ? top1.data() : nullptr},
                   overwrite ? turned.data() : nullptr, threads);
  chunk.check_gaps(turned);
  if (!overwrite) CHECK(turned == chunk.logits, "a chunk was written to without being asked");
  for (int64_t n = 0; n < count; ++n) {
    const Row row = exact_row(chunk, n, kto::label_of(chunk.rows, n), scale);
    check_logp(row, logps[n], n);
    if (overwrite)
      check_gradient(row, turned.data() + kto::logits_offset(moved, n) * chunk.size, 1.0f, moved,
                     scale, n);
    if (outputs && row.finite)
      CHECK(entropy[n] >= 0 && double(entropy[n]) <= log(double(vocab)) + row.tolerance,
            "entropy %g", double(entropy[n]));
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::vector<std::string> isas = kto::instruction_sets();
  Choices choices(data, size);
  setenv("KTO_KERNELS_CPU_ISA", isas[size_t(choices.below(int64_t(isas.size())))].c_str(), 1);
  run(choices);
  return 0;
}
