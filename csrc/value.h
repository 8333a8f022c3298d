// The formulas of one row and of one sequence: how softmax statistics are merged, the label's
// log-probability, and the value function with its derivative. The C++ kernels call all of them.
// The CUDA kernels call those of a sequence; those of a row would cost them too much fp64, and
// cuda/kernels.cuh has its own.
#pragma once

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define KTO_HD __host__ __device__ static __forceinline__
#else
#define KTO_HD static inline
#endif

namespace kto {

// The statistics of the softmax over some of a row's scaled logits z: an origin near their maximum,
// and the sum of exp(z - origin). The origin only keeps the sum from overflowing: any other one
// describes the same softmax. Over no logits at all they are {-inf, 0}.
template <class Real>
struct Statistics {
  Real origin, sum;
};

// a - b, but -inf (a saturated log-ratio) instead of NaN where both are the same infinity.
template <class Real>
KTO_HD Real difference(Real a, Real b) {
  return (isinf(a) && a == b) ? -Real(INFINITY) : a - b;
}

// exp(z - origin); 0 for z = -inf even where the origin is -inf too.
template <class Real>
KTO_HD Real decay(Real z, Real origin) {
  return z == -Real(INFINITY) ? Real(0) : Real(exp(z - origin));
}

template <class Real>
KTO_HD Statistics<Real> merge(Statistics<Real> a, Statistics<Real> b) {
  const Real origin = a.origin > b.origin ? a.origin : b.origin;
  return {origin, a.sum * decay(a.origin, origin) + b.sum * decay(b.origin, origin)};
}

// The moment is the entropy's second sum, that of exp(z - origin) (z - origin). moment_at returns
// what it is at another origin than that of its statistics, `from`.
template <class Real>
KTO_HD Real moment_at(Real origin, Statistics<Real> from, Real moment) {
  const Real step = from.origin == -Real(INFINITY) ? Real(0) : from.origin - origin;
  return (moment + step * from.sum) * decay(from.origin, origin);
}

// -sum_v p_v log p_v of a whole row, 0 where every logit is -inf.
template <class Real>
KTO_HD Real entropy(Real sum, Real moment) {
  if (sum == 0) return 0;
  const Real value = log(sum) - moment / sum;
  return value < 0 ? Real(0) : value;  // negative by rounding; NaN stays NaN
}

// Stage token_logps: the log-probability of the label with scaled logit y, given the statistics of
// all *other* logits. log1p of the others is exact where the label is the maximum, as it is for
// most tokens of a good completion.
template <class Real>
KTO_HD Real label_logp(Statistics<Real> others, Real y) {
  if (isnan(others.sum) || isnan(y) || y == Real(INFINITY)) return Real(NAN);
  if (y == -Real(INFINITY)) return y;
  if (y >= others.origin) return -log1p(others.sum * decay(others.origin, y));
  return (y - others.origin) - log(others.sum + decay(y, others.origin));
}

template <class Real>
KTO_HD Real sigmoid(Real x) {
  if (x >= 0) return 1 / (1 + exp(-x));
  const Real e = exp(x);
  return e / (1 + e);
}

struct ValueOptions {
  double beta, desirable_weight, undesirable_weight;
};

struct SequenceLoss {
  double loss;   // lambda - v, computed as lambda * sigmoid(-x)
  double slope;  // d loss / d log_ratio
};

// Stages value and loss of one sequence: x = +-beta (log_ratio - z0), loss = lambda sigmoid(-x).
KTO_HD SequenceLoss sequence_loss(double log_ratio, double z0, bool desirable,
                                  const ValueOptions& options) {
  const double sign = desirable ? 1 : -1;
  const double weight = desirable ? options.desirable_weight : options.undesirable_weight;
  const double x = sign * options.beta * difference(log_ratio, z0);
  const double below = sigmoid(-x);
  return {weight * below, -sign * weight * options.beta * (sigmoid(x) * below)};
}

// The largest power of two that is not above x >= 0: at least the smallest normal fp32 number, and
// 1 where x is not finite. It has the exponent of x, and no mantissa.
KTO_HD double power_of_two_below(double x) {
  uint64_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits &= 0x7ff0000000000000;
  memcpy(&x, &bits, sizeof x);
  return isinf(x) ? 1 : fmax(x, 0x1p-126);
}

}  // namespace kto
