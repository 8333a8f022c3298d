// Forward and backward over the rows of a set of logits. The forward reads them once, the backward
// reads and writes them once, and for a chunk both together read and write memory once. This file
// is compiled once per instruction set; KTO_ISA names the table that it fills.
#include "kernels.h"

#include "vector.h"

namespace kto {
namespace {

constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes;
// Sums stay in fp32 lanes for this many logits and are then added to an fp64 total.
constexpr int64_t kBlock = 64 * kStep;
// The running origin is raised only when a score exceeds it by this much in z, so that rescaling is
// rare. The lag must be small: a gap above the origin is rounded, by at most 2^-24 for gaps up to 2
// and by 2^-22 for gaps up to 8.
constexpr float kLag = 2.0f;

template <bool kSoftcap>
inline Floats score(Floats x, const Scale& scale) {
  if constexpr (kSoftcap) return tanh(x * scale.inner);
  return x;
}

// The sums within one block of logits.
struct Lanes {
  Floats sums[kUnroll] = {};
  Floats moment = {}, total = {};  // for the outputs
};

// The softmax of the logits read so far and, with kOutputs, the sums that the outputs need.
template <bool kOutputs>
struct Running {
  const float outer;
  Statistics<double> statistics = {-INFINITY, 0.0};
  float origin = -INFINITY;         // the score behind statistics.origin, which is rounded
  Floats finite_origin = {};        // origin in each lane, or 0 while it is -inf
  Floats limit = splat(-INFINITY);  // a score above it raises the origin

  double moment = 0.0;                // sum of exp(z - origin) (z - origin)
  double total = 0.0;                 // sum of the scores
  Floats highest = splat(-INFINITY);  // logit: under a softcap, different logits may score the same

  void add(const Lanes& lanes) {
    const Floats* sums = lanes.sums;
    statistics.sum += reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if constexpr (kOutputs) {
      moment += reduce_sum(lanes.moment);
      total += reduce_sum(lanes.total);
    }
  }

  // Adds the lanes, moves the origin to the highest of u, and returns new lanes of zeros.
  Lanes raise(Floats u, const Lanes& lanes) {
    add(lanes);
    origin = reduce_max(u);
    const double raised = double(origin) * outer;
    if constexpr (kOutputs) moment = moment_at(raised, statistics, moment);
    statistics = {raised, statistics.sum * decay(statistics.origin, raised)};
    finite_origin = splat(origin);
    limit = splat(origin + kLag / outer);
    return {};
  }
};

// Folds x[0, n) into the running softmax, reading each logit once.
template <class T, bool kSoftcap, bool kOutputs>
void fold(const T* x, int64_t n, const Scale& scale, Running<kOutputs>& running) {
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = n - start < kBlock ? n : start + kBlock;
    Lanes lanes;
    int64_t v = start;
    for (; v + kStep <= end; v += kStep) {
      Floats u[kUnroll];
      for (int k = 0; k < kUnroll; k += 2) load2(x + v + k * kLanes, u[k], u[k + 1]);
      if constexpr (kOutputs)
        running.highest = max(running.highest, max(max(u[0], u[1]), max(u[2], u[3])));
      for (int k = 0; k < kUnroll; ++k) u[k] = score<kSoftcap>(u[k], scale);
      const Floats maxima = max(max(u[0], u[1]), max(u[2], u[3]));
      if (any(maxima > running.limit)) lanes = running.raise(maxima, lanes);
      Floats moments[kUnroll];
      for (int k = 0; k < kUnroll; ++k) {
        const Floats gap = (u[k] - running.finite_origin) * running.outer;
        const Floats e = exp(gap);
        lanes.sums[k] += e;
        moments[k] = e * finite_exponent(gap);  // 0 for a gap of -inf
      }
      if constexpr (kOutputs) {
        lanes.moment += (moments[0] + moments[1]) + (moments[2] + moments[3]);
        lanes.total += (u[0] + u[1]) + (u[2] + u[3]);
      }
    }
    for (; v < end; v += kLanes) {
      const int64_t count = end - v < kLanes ? end - v : kLanes;
      const Floats x_v = load_tail(x + v, count);
      Floats u = score<kSoftcap>(x_v, scale);
      if constexpr (kOutputs) {
        running.highest = max(running.highest, x_v);
        for (int64_t k = 0; k < count; ++k) running.total += u[k];
      }
      for (int64_t k = count; k < kLanes; ++k)
        u[k] = -INFINITY;  // lanes behind the end, which a softcap made finite
      if (any(u > running.limit)) lanes = running.raise(u, lanes);
      const Floats gap = (u - running.finite_origin) * running.outer;
      const Floats e = exp(gap);
      lanes.sums[0] += e;
      if constexpr (kOutputs) lanes.moment += e * finite_exponent(gap);
    }
    running.add(lanes);
  }
}

struct ScoredRow {
  float logp, origin, sum;
  float entropy, mean_logits;  // outputs, as is_top1 is
  bool is_top1;
};

template <class T, bool kSoftcap, bool kOutputs>
ScoredRow score_row(const T* x, int64_t vocab, int64_t label, const Scale& scale) {
  Running<kOutputs> running{scale.outer};
  const int64_t front = label < 0 ? 0 : label, back = label < 0 ? 0 : label + 1;
  fold<T, kSoftcap>(x, front, scale, running);
  const float before = reduce_max(running.highest);
  fold<T, kSoftcap>(x + back, vocab - back, scale, running);
  const Floats x_y = splat(label < 0 ? -INFINITY : load_one(x + label));
  const float u = label < 0 ? -INFINITY : score<kSoftcap>(x_y, scale)[0];
  const double y = double(u) * scale.outer;
  const Statistics<double> others = running.statistics, all = merge(others, {y, decay(y, y)});
  const float origin = u > running.origin ? u : running.origin;
  ScoredRow row{float(label_logp(others, y)), origin, float(all.sum), 0, 0, false};
  if constexpr (kOutputs) {
    const double moment =
        moment_at(all.origin, others, running.moment) + moment_at(all.origin, {y, 1.0}, 0.0);
    row.entropy = float(entropy(all.sum, moment));
    row.mean_logits = float((running.total + u) * scale.outer / double(vocab));
    // A row whose softmax is NaN has no argmax.
    row.is_top1 =
        !isnan(all.sum) && (label == 0 || before < x_y[0]) && reduce_max(running.highest) <= x_y[0];
  }
  return row;
}

template <class T, bool kSoftcap>
void forward(const Rows& rows, const Scale& scale, const RowStatistics& out, int64_t begin,
             int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t label = label_of(rows, n);
    if (label == kIgnored) {  // an ignored row costs no pass over its logits
      out.logps[n] = out.origin[n] = out.sum[n] = 0;
      continue;
    }
    const T* x = static_cast<const T*>(rows.logits) + logits_offset(rows, n);
    const ScoredRow row = score_row<T, kSoftcap, false>(x, rows.vocab, label, scale);
    out.logps[n] = row.logp;
    out.origin[n] = row.origin;
    out.sum[n] = row.sum;
  }
}

// Writes g times the gradient of the label's log-probability: -g p_v dz/dx for each v, and
// g (1 - p_y) dz/dx at the label.
template <class T, bool kSoftcap>
void backward_row(const T* x, T* out, int64_t vocab, int64_t label, double g, float logp,
                  float origin, float sum, const Scale& scale) {
  const double slope = g * scale.slope;
  const double y = label < 0 ? 0 : score<kSoftcap>(splat(load_one(x + label)), scale)[0];
  const float factor = float(sum == 0 ? -slope : -slope / sum);
  const float finite_origin = origin == -INFINITY ? 0.0f : origin;
  if (isnan(factor)) {  // one NaN among the logits makes all of the row's gradient NaN
    for (int64_t v = 0; v < vocab; ++v) store_one(out + v, NAN);
    return;
  }
  const auto gradient = [&](Floats x_v) {
    const Floats u = score<kSoftcap>(x_v, scale);
    const Floats p = exp((u - finite_origin) * scale.outer) * factor;
    if constexpr (kSoftcap) return p * (1.0f - u * u);
    return p;
  };
  int64_t v = 0;
  for (; v + kStep <= vocab; v += kStep) {
    Floats x_v[kUnroll];
    for (int k = 0; k < kUnroll; k += 2) load2(x + v + k * kLanes, x_v[k], x_v[k + 1]);
    for (int k = 0; k < kUnroll; ++k) x_v[k] = gradient(x_v[k]);
    for (int k = 0; k < kUnroll; k += 2) store2(out + v + k * kLanes, x_v[k], x_v[k + 1]);
  }
  for (; v < vocab; v += kLanes) {
    const int64_t count = vocab - v < kLanes ? vocab - v : kLanes;
    store_tail(out + v, gradient(load_tail(x + v, count)), count);
  }
  if (label < 0) return;
  // 1 - p_y is computed from the log-probability: rounding p_y first would lose its digits for
  // every near-certain token.
  store_one(out + label, float(slope * -expm1(double(logp)) * (kSoftcap ? 1 - y * y : 1)));
}

template <class T, bool kSoftcap>
void backward(const Rows& rows, const Scale& scale, const Gradient& gradient,
              const RowStatistics& statistics, const Destination& output, int64_t begin,
              int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t label = label_of(rows, n);
    const double g = label == kIgnored ? 0.0 : gradient_of(gradient, rows, n);
    const int64_t offset =
        rows.tokens == 0 ? n * output.stride_t
                         : n / rows.tokens * output.stride_b + n % rows.tokens * output.stride_t;
    T* out = static_cast<T*>(output.data) + offset;
    if (g == 0) {
      memset(out, 0, rows.vocab * sizeof(T));
      continue;
    }
    const T* x = static_cast<const T*>(rows.logits) + logits_offset(rows, n);
    backward_row<T, kSoftcap>(x, out, rows.vocab, label, g, statistics.logps[n],
                              statistics.origin[n], statistics.sum[n], scale);
  }
}

template <class T, bool kSoftcap, bool kOutputs>
void chunk(const Rows& rows, const Scale& scale, const ChunkScores& out, void* gradient,
           int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t label = label_of(rows, n), offset = logits_offset(rows, n);
    const T* x = static_cast<const T*>(rows.logits) + offset;
    const ScoredRow row = score_row<T, kSoftcap, kOutputs>(x, rows.vocab, label, scale);
    out.logps[n] = row.logp;
    if (out.entropy != nullptr) out.entropy[n] = row.entropy;
    if (out.mean_logits != nullptr) out.mean_logits[n] = row.mean_logits;
    if (out.is_top1 != nullptr) out.is_top1[n] = row.is_top1;
    if (gradient != nullptr)
      backward_row<T, kSoftcap>(x, static_cast<T*>(gradient) + offset, rows.vocab, label, 1.0,
                                row.logp, row.origin, row.sum, scale);
  }
}

// Calls body with the logits' type and the softcap as template arguments.
template <class Body>
void dispatch(DType dtype, bool softcap, Body&& body) {
  const auto with_type = [&](auto value) {
    if (softcap)
      body.template operator()<decltype(value), true>();
    else
      body.template operator()<decltype(value), false>();
  };
  switch (dtype) {
    case DType::f32:
      return with_type(float{});
    case DType::f16:
      return with_type(f16{});
    case DType::bf16:
      return with_type(bf16{});
  }
}

void forward_any(const Rows& rows, const Scale& scale, const RowStatistics& out, int64_t begin,
                 int64_t end) {
  dispatch(rows.dtype, scale.softcap,
           [&]<class T, bool kSoftcap>() { forward<T, kSoftcap>(rows, scale, out, begin, end); });
}

void backward_any(const Rows& rows, const Scale& scale, const Gradient& gradient,
                  const RowStatistics& statistics, const Destination& output, int64_t begin,
                  int64_t end) {
  dispatch(rows.dtype, scale.softcap, [&]<class T, bool kSoftcap>() {
    backward<T, kSoftcap>(rows, scale, gradient, statistics, output, begin, end);
  });
}

void chunk_any(const Rows& rows, const Scale& scale, const ChunkScores& out, void* gradient,
               int64_t begin, int64_t end) {
  dispatch(rows.dtype, scale.softcap, [&]<class T, bool kSoftcap>() {
    if (out.entropy != nullptr || out.mean_logits != nullptr || out.is_top1 != nullptr)
      chunk<T, kSoftcap, true>(rows, scale, out, gradient, begin, end);
    else
      chunk<T, kSoftcap, false>(rows, scale, out, gradient, begin, end);
  });
}

}  // namespace

#define KTO_PASTE(a, b) a##b
#define KTO_TABLE(isa) KTO_PASTE(kKernels_, isa)
#define KTO_STRING(isa) #isa
#define KTO_NAME(isa) KTO_STRING(isa)

extern const Kernels KTO_TABLE(KTO_ISA) = {KTO_NAME(KTO_ISA), forward_any, backward_any, chunk_any};

}  // namespace kto
