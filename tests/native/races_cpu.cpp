// The CPU engine's threads, for ThreadSanitizer: from the first call on, several callers run at
// once, each with threads of its own and with rows enough for many blocks. The bits must be those
// of one thread.
#include <optional>
#include <thread>

#include "../../csrc/cpu/engine.h"
#include "problem.h"

using namespace fuzz;

namespace {

struct Result {
  Buffer<float> logps, origin, sum, loss, scores;
  Buffer<uint8_t> gradient, chunk;

  bool operator==(const Result& other) const {
    return logps == other.logps && origin == other.origin && sum == other.sum &&
           loss == other.loss && scores == other.scores && gradient == other.gradient &&
           chunk == other.chunk;
  }
};

Result run(const kto::Rows& rows, const Buffer<uint8_t>& logits, const kto::Scale& scale,
           const Buffer<bool>& desirable, int threads) {
  const int64_t n = rows.n_rows;
  Result result{Buffer<float>(n), Buffer<float>(n),        Buffer<float>(n),       Buffer<float>(1),
                Buffer<float>(n), Buffer<uint8_t>(logits), Buffer<uint8_t>(logits)};
  kto::token_logps_forward(rows, scale,
                           {result.logps.data(), result.origin.data(), result.sum.data()}, threads);
  const int64_t count = rows.n_sequences;
  Buffer<double> sums(count);
  Buffer<int64_t> counts(count);
  Buffer<float> rewards(count), kl(1), coefficients(count), one(1);
  kto::sequence_logps(rows, result.logps.data(), true, sums.data(), counts.data());
  kto::sequence_stages({count, sums.data(), nullptr, desirable.data(), counts.data(), true},
                       {0, nullptr, nullptr, 0.1}, {0.1, 1, 1}, kto::Reduction::mean,
                       {result.loss.data(), rewards.data(), kl.data(), coefficients.data()});
  one[0] = 1;
  kto::Rows own = rows;  // in place
  own.logits = result.gradient.data();
  kto::logits_backward(own, scale, {one.data(), 0, coefficients.data()},
                       {result.logps.data(), result.origin.data(), result.sum.data()},
                       {result.gradient.data(), rows.logits_stride_b, rows.logits_stride_t},
                       threads);
  own.logits = result.chunk.data();
  kto::score_chunk(own, scale, {result.scores.data(), nullptr, nullptr, nullptr},
                   result.chunk.data(), threads);
  return result;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  Choices choices(data, size);
  const DType dtype = choices.of({DType::f32, DType::f16, DType::bf16});
  const Problem problem(choices, Layout::of_packed({0, 50, 51, 120}), dtype, 9001, true);
  const kto::Scale scale = any_scale(choices);
  Buffer<bool> desirable(problem.rows.n_sequences);
  for (int64_t i = 0; i < problem.rows.n_sequences; ++i) desirable[i] = choices.one_in(2);
  std::vector<std::optional<Result>> results(4);
  std::vector<std::thread> callers;
  for (size_t i = 0; i < results.size(); ++i)
    callers.emplace_back([&, i] {
      results[i].emplace(run(problem.rows, problem.logits, scale, desirable, 2 + int(i)));
    });
  for (auto& caller : callers) caller.join();
  const Result alone = run(problem.rows, problem.logits, scale, desirable, 1);
  for (const auto& result : results) CHECK(*result == alone, "dtype %d", int(dtype));
  return 0;
}
