// The launches of csrc/cuda/launch.h, emulated on the host, on random problems, with blocks and
// threads in random order. Nothing is read or written outside of the buffers, every vector is
// aligned as a GPU requires, every result is near fp64's, and the counters end at zero.
#include "../../csrc/cuda/launch.h"
#include "problem.h"

namespace kto {
extern unsigned emulation_seed;
}

using namespace fuzz;

namespace {

struct Scored {
  Problem problem;
  Buffer<float> logps, origin, sum;
  Buffer<double> sums, counts;

  Scored(Choices& choices, const Layout& layout, DType dtype, int64_t vocab, bool shift)
      : problem(choices, layout, dtype, vocab),
        logps(problem.rows.n_rows),
        origin(problem.rows.n_rows),
        sum(problem.rows.n_rows),
        sums(problem.rows.n_sequences),
        counts(problem.rows.n_sequences) {
    problem.rows.shift = shift;
  }
  // The policy alone has statistics for a backward, and counts.
  kto::RowSet set(bool policy, bool average) const {
    return {problem.rows,
            0,
            logps.data(),
            policy ? origin.data() : nullptr,
            policy ? sum.data() : nullptr,
            sums.data(),
            policy && average ? counts.data() : nullptr};
  }
};

kto::Values given(const Buffer<double>& values) { return {values.data(), kto::kF64, 1}; }

constexpr kto::Values kAbsent = {nullptr, 0, 0};

void run(Choices& choices) {
  kto::emulation_seed = unsigned(choices.below(256));
  const DType dtype = choices.of({DType::f32, DType::f16, DType::bf16});
  const int64_t vocab = any_vocabulary(choices);
  const kto::Scale scale = any_scale(choices);
  const int splits = choices.of({1, 2, 7});
  const bool shift = choices.one_in(3), average = choices.one_in(2);
  const Layout layout = Layout::of(choices, 3, 4), kl_layout = Layout::of(choices, 3, 3);

  // The whole loss: the policy with or without a reference, with or without KL logits.
  const Scored policy(choices, layout, dtype, vocab, shift);
  const Scored reference(choices, layout, dtype, vocab, shift);
  const Scored kl(choices, kl_layout, dtype, vocab, shift);
  const bool with_reference = choices.one_in(2), with_kl = choices.one_in(2);
  kto::ForwardArguments arguments{};
  for (const Scored* scored : {&policy, &reference, &kl}) {
    if (scored == &reference ? !with_reference : scored == &kl ? !with_kl : false) continue;
    arguments.sets[arguments.n_sets] = scored->set(scored == &policy, average);
    arguments.sets[arguments.n_sets++].first = arguments.n_rows;
    arguments.n_rows += scored->problem.rows.n_rows;
  }
  const kto::Rows& rows = policy.problem.rows;
  const int64_t count = rows.n_sequences;
  Buffer<kto::Share> shares(splits > 1 ? arguments.n_rows * splits : 0);
  Buffer<unsigned> arrivals(1 + arguments.n_rows);
  for (int64_t i = 0; i <= arguments.n_rows; ++i) arrivals[i] = 0;
  arguments.splits = splits;
  arguments.shares = shares.data();
  arguments.arrivals = arrivals.data();
  arguments.scale = scale;
  const auto reduction = kto::Reduction(choices.below(3));
  const bool one_each = reduction == kto::Reduction::none;
  Buffer<bool> desirable(count);
  for (int64_t i = 0; i < count; ++i) desirable[i] = choices.one_in(2);
  Buffer<float> loss(one_each ? count : 1), rewards(count), kl_out(1), coefficients(count);
  Buffer<double> ref_out(count);
  arguments.stages = {true,
                      average,
                      reduction,
                      count,
                      with_kl ? kl.problem.rows.n_sequences : 0,
                      policy.sums.data(),
                      policy.counts.data(),
                      with_reference ? given(reference.sums) : kAbsent,
                      with_kl ? given(kl.sums) : kAbsent,
                      kAbsent,
                      kAbsent,
                      0.5,
                      desirable.data(),
                      1,
                      {0.1, 1.5, 0.5},
                      loss.data(),
                      ref_out.data(),
                      rewards.data(),
                      kl_out.data(),
                      coefficients.data()};
  kto::launch_forward(arguments, {});
  for (int64_t i = 0; i <= arguments.n_rows; ++i)
    CHECK(arrivals[i] == 0, "counter %ld: %u", long(i), arrivals[i]);
  for (int64_t i = 0; i < count; ++i)
    if (one_each && isfinite(policy.sums[i]) && isfinite(ref_out[i]) && !isnan(kl_out[0]))
      CHECK(loss[i] >= 0 && loss[i] <= 1.5f, "loss %g", double(loss[i]));

  // The loss's gradient, to a new buffer and over the logits.
  Buffer<float> grad(count);
  for (int64_t i = 0; i < count; ++i) grad[i] = choices.normal();
  const kto::Gradient gradient{grad.data(), 1, coefficients.data()};
  const Problem& problem = policy.problem;
  const int64_t size = problem.size;
  Buffer<uint8_t> packed(rows.n_rows * vocab * size, choices.below(16 / size) * size);
  Buffer<uint8_t> over(problem.logits);
  kto::BackwardArguments backward{rows,
                                  scale,
                                  gradient,
                                  policy.logps.data(),
                                  policy.origin.data(),
                                  policy.sum.data(),
                                  packed.data(),
                                  rows.tokens * vocab,
                                  vocab,
                                  splits};
  kto::launch_backward(backward, {});
  backward.rows.logits = backward.out = over.data();
  backward.out_stride_b = rows.logits_stride_b;
  backward.out_stride_t = rows.logits_stride_t;
  kto::launch_backward(backward, {});
  problem.check_gaps(over);
  for (int64_t n = 0; n < rows.n_rows; ++n) {
    const int64_t label = kto::label_of(rows, n);
    const uint8_t* places[] = {packed.data() + n * vocab * size,
                               over.data() + kto::logits_offset(rows, n) * size};
    if (label < 0) {
      CHECK(policy.logps[n] == 0, "row %ld is not scored", long(n));
      for (const uint8_t* found : places)
        for (int64_t i = 0; i < vocab * size; ++i)
          CHECK(found[i] == 0, "row %ld is not scored", long(n));
      continue;
    }
    const Row row = exact_row(problem, n, label, scale);
    check_logp(row, policy.logps[n], n);
    const float g = kto::gradient_of(gradient, rows, n);
    if (!isfinite(g)) continue;
    for (const uint8_t* found : places) check_gradient(row, found, g, rows, scale, n);
  }

  // A chunk.
  const Problem chunk(choices, Layout::of_one(choices.below(9)), dtype, vocab, true);
  const int64_t n_rows = chunk.rows.n_rows;
  Buffer<uint8_t> turned(chunk.logits);
  kto::Rows moved = chunk.rows;
  moved.logits = turned.data();
  const bool outputs = choices.one_in(2), overwrite = !choices.one_in(4);
  Buffer<float> logps(n_rows), entropy(n_rows), mean(n_rows);
  Buffer<bool> top1(n_rows);
  kto::launch_chunk({moved, scale, overwrite ? turned.data() : nullptr, logps.data(),
                     outputs ? entropy.data() : nullptr, outputs ? mean.data() : nullptr,
                     outputs ? top1.data() : nullptr},
                    {});
  chunk.check_gaps(turned);
  if (!overwrite) CHECK(turned == chunk.logits, "a chunk was written to without being asked");
  for (int64_t n = 0; n < n_rows; ++n) {
    const Row row = exact_row(chunk, n, kto::label_of(chunk.rows, n), scale);
    check_logp(row, logps[n], n);
    if (overwrite)
      check_gradient(row, turned.data() + kto::logits_offset(moved, n) * size, 1.0f, moved, scale,
                     n);
  }

  // The multiplication in place.
  const int64_t elements = vocab;
  Buffer<uint8_t> values(elements * size, choices.below(16 / size) * size);
  for (int64_t i = 0; i < elements; ++i) encode(values.data() + i * size, dtype, choices.normal());
  Buffer<uint8_t> before(values);
  Buffer<double> factor(1);
  factor[0] = choices.of({1.0, -1.0, 2.0});
  kto::launch_multiply({values.data(), dtype, elements, given(factor), 1 + int(choices.below(4))},
                       {});
  for (int64_t i = 0; i < elements; ++i)
    CHECK(decode(values.data() + i * size, dtype) ==
              factor[0] * decode(before.data() + i * size, dtype),
          "element %ld", long(i));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Choices choices(data, size);
  run(choices);
  return 0;
}
