// The O(1) formulas of the loss, for host and device: the softmax merge, the label's
// log-probability, and the value function with its derivative. Every native kernel calls these.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define KTO_HD __host__ __device__ static __forceinline__
#else
#define KTO_HD static inline
#endif

namespace kto {

// A sum of exp(z - reference) over some of a row's scaled logits z; empty: {-inf, 0}. The reference
// is near their maximum, close enough that nothing overflows; any such number gives the same sum.
template <class Real>
struct Partial {
  Real reference, sum;
};

// a - b where two equal infinities leave -inf (saturated) instead of NaN.
template <class Real>
KTO_HD Real difference(Real a, Real b) {
  return (isinf(a) && a == b) ? -Real(INFINITY) : a - b;
}

// exp(z - reference); 0 for z = -inf even where the reference is -inf too.
template <class Real>
KTO_HD Real decay(Real z, Real reference) {
  return z == -Real(INFINITY) ? Real(0) : Real(exp(z - reference));
}

template <class Real>
KTO_HD Partial<Real> merge(Partial<Real> a, Partial<Real> b) {
  const Real reference = a.reference > b.reference ? a.reference : b.reference;
  return {reference, a.sum * decay(a.reference, reference) + b.sum * decay(b.reference, reference)};
}

// The entropy's second sum, that of exp(z - reference) (z - reference), moved from the reference of
// its Partial to another one.
template <class Real>
KTO_HD Real weighted_at(Real reference, Partial<Real> of, Real weighted) {
  const Real step = of.reference == -Real(INFINITY) ? Real(0) : of.reference - reference;
  return (weighted + step * of.sum) * decay(of.reference, reference);
}

// -sum_v p_v log p_v of a whole row, 0 where every logit is -inf.
template <class Real>
KTO_HD Real entropy(Real sum, Real weighted) {
  if (sum == 0) return 0;
  const Real value = log(sum) - weighted / sum;
  return value < 0 ? Real(0) : value;  // by rounding; NaN stays NaN
}

// Stage token_logps: log-probability of the label with scaled logit y, given the partial softmax of
// all *other* logits. Leaving the label out keeps log1p exact where the label is the maximum, which
// is most tokens of a good completion.
template <class Real>
KTO_HD Real label_logp(Partial<Real> others, Real y) {
  if (isnan(others.sum) || isnan(y) || y == Real(INFINITY)) return Real(NAN);
  if (y == -Real(INFINITY)) return y;
  if (y >= others.reference) return -log1p(others.sum * decay(others.reference, y));
  return (y - others.reference) - log(others.sum + decay(y, others.reference));
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

}  // namespace kto
