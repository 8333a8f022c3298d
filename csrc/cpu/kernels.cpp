// Forward and backward over the rows of a set of logits: one read forward, one read and one write
// backward; or both at once, one read and one write of memory. Compiled once per instruction set,
// with KTO_ISA naming the table it fills.
#include "kernels.h"

#include "vector.h"

namespace kto {
namespace {

constexpr int kUnroll = 4;
constexpr int64_t kStep = kUnroll * kLanes;
// Sums stay in fp32 lanes for this many logits, then join an fp64 total.
constexpr int64_t kBlock = 64 * kStep;
// The running reference follows the maximum only once it lags by this much, so that rescaling stays
// rare. Little, as a gap above the reference is rounded: by 2^-24 at most up to 2, by 2^-22 up
// to 8.
constexpr float kLag = 2.0f;

template <bool kSoftcap>
inline Floats unit(Floats x, const Scale& scale) {
  if constexpr (kSoftcap) return tanh(x * scale.inner);
  return x;
}

// Sums within a block.
struct Lanes {
  Floats sums[kUnroll] = {};
  Floats weighted = {}, total = {};  // by-products
};

// A partial softmax in the making, over z = outer * u; with its by-products or without.
template <bool kByProducts>
struct Running {
  const float outer;
  Partial<double> partial = {-INFINITY, 0.0};
  float highest_u = -INFINITY;      // partial.reference / outer: exact, where z would be rounded
  Floats origin = {};               // highest_u, or 0 while that is -inf
  Floats limit = splat(-INFINITY);  // a u above it moves the reference

  double weighted = 0.0;              // sum of exp(z - reference) (z - reference)
  double total = 0.0;                 // sum of u
  Floats highest = splat(-INFINITY);  // of the logits, since a softcap may tie them

  void join(const Lanes& lanes) {
    const Floats* sums = lanes.sums;
    partial.sum += reduce_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
    if constexpr (kByProducts) {
      weighted += reduce_sum(lanes.weighted);
      total += reduce_sum(lanes.total);
    }
  }

  // Joins the lanes and returns fresh ones.
  Lanes raise(Floats u, const Lanes& lanes) {
    join(lanes);
    highest_u = reduce_max(u);
    const double raised = double(highest_u) * outer;
    if constexpr (kByProducts) weighted = weighted_at(raised, partial, weighted);
    partial = {raised, partial.sum * decay(partial.reference, raised)};
    origin = splat(highest_u);
    limit = splat(highest_u + kLag / outer);
    return {};
  }
};

// Adds x[0, n) to the running softmax, reading each logit once.
template <class T, bool kSoftcap, bool kByProducts>
void accumulate(const T* x, int64_t n, const Scale& scale, Running<kByProducts>& running) {
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t end = n - start < kBlock ? n : start + kBlock;
    Lanes lanes;
    int64_t v = start;
    for (; v + kStep <= end; v += kStep) {
      Floats u[kUnroll];
      for (int k = 0; k < kUnroll; k += 2) load2(x + v + k * kLanes, u[k], u[k + 1]);
      if constexpr (kByProducts)
        running.highest = max(running.highest, max(max(u[0], u[1]), max(u[2], u[3])));
      for (int k = 0; k < kUnroll; ++k) u[k] = unit<kSoftcap>(u[k], scale);
      const Floats maxima = max(max(u[0], u[1]), max(u[2], u[3]));
      if (any(maxima > running.limit)) lanes = running.raise(maxima, lanes);
      Floats weighted[kUnroll];
      for (int k = 0; k < kUnroll; ++k) {
        const Floats gap = (u[k] - running.origin) * running.outer;
        const Floats e = exp(gap);
        lanes.sums[k] += e;
        weighted[k] = e * finite_exponent(gap);  // 0 for a gap of -inf
      }
      if constexpr (kByProducts) {
        lanes.weighted += (weighted[0] + weighted[1]) + (weighted[2] + weighted[3]);
        lanes.total += (u[0] + u[1]) + (u[2] + u[3]);
      }
    }
    for (; v < end; v += kLanes) {
      const int64_t count = end - v < kLanes ? end - v : kLanes;
      const Floats x_v = load_tail(x + v, count);
      Floats u = unit<kSoftcap>(x_v, scale);
      if constexpr (kByProducts) {
        running.highest = max(running.highest, x_v);
        for (int64_t k = 0; k < count; ++k) running.total += u[k];
      }
      for (int64_t k = count; k < kLanes; ++k) u[k] = -INFINITY;  // a softcap made them finite
      if (any(u > running.limit)) lanes = running.raise(u, lanes);
      const Floats gap = (u - running.origin) * running.outer;
      const Floats e = exp(gap);
      lanes.sums[0] += e;
      if constexpr (kByProducts) lanes.weighted += e * finite_exponent(gap);
    }
    running.join(lanes);
  }
}

struct RowScores {
  float logp, reference, sum;
  float entropy, mean_logits;  // by-products, like the next
  bool is_top1;
};

template <class T, bool kSoftcap, bool kByProducts>
RowScores score_row(const T* x, int64_t vocab, int64_t label, const Scale& scale) {
  Running<kByProducts> running{scale.outer};
  const int64_t front = label < 0 ? 0 : label, back = label < 0 ? 0 : label + 1;
  accumulate<T, kSoftcap>(x, front, scale, running);
  const float before = reduce_max(running.highest);
  accumulate<T, kSoftcap>(x + back, vocab - back, scale, running);
  const Floats x_y = splat(label < 0 ? -INFINITY : load_one(x + label));
  const float u = label < 0 ? -INFINITY : unit<kSoftcap>(x_y, scale)[0];
  const double y = double(u) * scale.outer;
  const Partial<double> others = running.partial, all = merge(others, {y, decay(y, y)});
  const float reference = u > running.highest_u ? u : running.highest_u;
  RowScores scores{float(label_logp(others, y)), reference, float(all.sum), 0, 0, false};
  if constexpr (kByProducts) {
    const double weighted = weighted_at(all.reference, others, running.weighted) +
                            weighted_at(all.reference, {y, 1.0}, 0.0);
    scores.entropy = float(entropy(all.sum, weighted));
    scores.mean_logits = float((running.total + u) * scale.outer / double(vocab));
    // A row whose softmax is NaN has no argmax.
    scores.is_top1 =
        !isnan(all.sum) && (label == 0 || before < x_y[0]) && reduce_max(running.highest) <= x_y[0];
  }
  return scores;
}

template <class T, bool kSoftcap>
void forward(const Rows& rows, const Scale& scale, const RowOutputs& out, int64_t begin,
             int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t label = label_of(rows, n);
    if (label == kIgnored) {  // an ignored row costs no pass over its logits
      out.logps[n] = out.reference[n] = out.sum[n] = 0;
      continue;
    }
    const T* x = static_cast<const T*>(rows.logits) + logits_offset(rows, n);
    const RowScores scores = score_row<T, kSoftcap, false>(x, rows.vocab, label, scale);
    out.logps[n] = scores.logp;
    out.reference[n] = scores.reference;
    out.sum[n] = scores.sum;
  }
}

// out[v] = d/dx_v of the label's log-probability, times g: -g p_v, and g (1 - p_y) at the label.
template <class T, bool kSoftcap>
void backward_row(const T* x, T* out, int64_t vocab, int64_t label, double g, float logp,
                  float reference, float sum, const Scale& scale) {
  const double slope = g * scale.slope;
  const double y = label < 0 ? 0 : unit<kSoftcap>(splat(load_one(x + label)), scale)[0];
  const float factor = float(sum == 0 ? -slope : -slope / sum);
  const float origin = reference == -INFINITY ? 0.0f : reference;
  if (isnan(factor)) {  // one NaN in the row is a NaN in every gradient of it
    for (int64_t v = 0; v < vocab; ++v) store_one(out + v, NAN);
    return;
  }
  const auto gradient = [&](Floats x_v) {
    const Floats u = unit<kSoftcap>(x_v, scale);
    const Floats p = exp((u - origin) * scale.outer) * factor;
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
  // 1 - p_y from the log-probability: rounding p_y first would lose every near-certain token.
  store_one(out + label, float(slope * -expm1(double(logp)) * (kSoftcap ? 1 - y * y : 1)));
}

template <class T, bool kSoftcap>
void backward(const Rows& rows, const Scale& scale, const Gradient& gradient,
              const RowStatistics& statistics, const Output& output, int64_t begin, int64_t end) {
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
                              statistics.reference[n], statistics.sum[n], scale);
  }
}

template <class T, bool kSoftcap, bool kByProducts>
void score(const Rows& rows, const Scale& scale, const ScoreOutputs& out, void* gradient,
           int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const int64_t label = label_of(rows, n), offset = logits_offset(rows, n);
    const T* x = static_cast<const T*>(rows.logits) + offset;
    const RowScores scores = score_row<T, kSoftcap, kByProducts>(x, rows.vocab, label, scale);
    out.logps[n] = scores.logp;
    if (out.entropy != nullptr) out.entropy[n] = scores.entropy;
    if (out.mean_logits != nullptr) out.mean_logits[n] = scores.mean_logits;
    if (out.is_top1 != nullptr) out.is_top1[n] = scores.is_top1;
    if (gradient != nullptr)
      backward_row<T, kSoftcap>(x, static_cast<T*>(gradient) + offset, rows.vocab, label, 1.0,
                                scores.logp, scores.reference, scores.sum, scale);
  }
}

// Calls body with a value of the logits' type and the softcap as a compile-time constant.
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

void forward_any(const Rows& rows, const Scale& scale, const RowOutputs& out, int64_t begin,
                 int64_t end) {
  dispatch(rows.dtype, scale.softcap,
           [&]<class T, bool kSoftcap>() { forward<T, kSoftcap>(rows, scale, out, begin, end); });
}

void backward_any(const Rows& rows, const Scale& scale, const Gradient& gradient,
                  const RowStatistics& statistics, const Output& output, int64_t begin,
                  int64_t end) {
  dispatch(rows.dtype, scale.softcap, [&]<class T, bool kSoftcap>() {
    backward<T, kSoftcap>(rows, scale, gradient, statistics, output, begin, end);
  });
}

void score_any(const Rows& rows, const Scale& scale, const ScoreOutputs& out, void* gradient,
               int64_t begin, int64_t end) {
  dispatch(rows.dtype, scale.softcap, [&]<class T, bool kSoftcap>() {
    if (out.entropy != nullptr || out.mean_logits != nullptr || out.is_top1 != nullptr)
      score<T, kSoftcap, true>(rows, scale, out, gradient, begin, end);
    else
      score<T, kSoftcap, false>(rows, scale, out, gradient, begin, end);
  });
}

}  // namespace

#define KTO_PASTE(a, b) a##b
#define KTO_TABLE(isa) KTO_PASTE(kKernels_, isa)
#define KTO_STRING(isa) #isa
#define KTO_NAME(isa) KTO_STRING(isa)

extern const Kernels KTO_TABLE(KTO_ISA) = {KTO_NAME(KTO_ISA), forward_any, backward_any, score_any};

}  // namespace kto
