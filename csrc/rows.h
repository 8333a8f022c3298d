// One set of logits as the kernels see it: where row n lies, which label scores it, and which
// sequence it belongs to. Plain data, for host and device.
#pragma once

#include <stdint.h>

#include "value.h"

namespace kto {

enum class DType : int { f32 = 0, f16 = 1, bf16 = 2 };

// int32 or int64 indices behind one pointer, read one at a time: there are only O(N) of them.
struct Indices {
  const void* data;
  bool is_int64;
};

KTO_HD int64_t index_at(const Indices& indices, int64_t i) {
  return indices.is_int64 ? static_cast<const int64_t*>(indices.data)[i]
                          : static_cast<const int32_t*>(indices.data)[i];
}

// Padded: logits (B, T, V), labels (B, T), tokens = T. Packed: logits (N, V), labels (N,),
// cu_seqlens (B + 1,), tokens = 0. Strides count elements; the logits of a row are contiguous.
struct Rows {
  const void* logits;
  DType dtype;
  int64_t n_rows, n_sequences, tokens, vocab;
  int64_t logits_stride_b, logits_stride_t;
  Indices labels;
  int64_t labels_stride_b, labels_stride_t;
  Indices cu_seqlens;
  int64_t ignore_index;
  bool shift;  // position t predicts the label of t + 1 of the same sequence
};

// The rows [begin, end) of a sequence.
struct Range {
  int64_t begin, end;
};

KTO_HD Range sequence_range(const Rows& rows, int64_t i) {
  if (rows.tokens > 0) return {i * rows.tokens, (i + 1) * rows.tokens};
  if (rows.cu_seqlens.data == nullptr) return {0, 0};  // padded with T = 0
  return {index_at(rows.cu_seqlens, i), index_at(rows.cu_seqlens, i + 1)};
}

KTO_HD int64_t sequence_of(const Rows& rows, int64_t n) {
  if (rows.tokens > 0) return n / rows.tokens;
  int64_t low = 0, high = rows.n_sequences;  // cu_seqlens[low] <= n < cu_seqlens[high]
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    if (index_at(rows.cu_seqlens, middle) <= n)
      low = middle;
    else
      high = middle;
  }
  return low;
}

KTO_HD int64_t logits_offset(const Rows& rows, int64_t n) {
  if (rows.tokens == 0) return n * rows.logits_stride_t;
  return n / rows.tokens * rows.logits_stride_b + n % rows.tokens * rows.logits_stride_t;
}

KTO_HD int64_t labels_offset(const Rows& rows, int64_t n) {
  if (rows.tokens == 0) return n * rows.labels_stride_t;
  return n / rows.tokens * rows.labels_stride_b + n % rows.tokens * rows.labels_stride_t;
}

// A label of this value stands for one whose column of the logits is on another rank.
constexpr int64_t kElsewhere = -(int64_t(1) << 62);

// label_of returns these for rows without a label here: kIgnored where nothing scores the row,
// kAbsent where the label's column is on another rank, so that its logit counts as -inf.
constexpr int64_t kIgnored = -1, kAbsent = -2;

// label_of for a row whose sequence is known to end before row `end`.
KTO_HD int64_t label_within(const Rows& rows, int64_t n, int64_t end) {
  if (rows.shift && n + 1 >= end) return kIgnored;
  const int64_t at = n + (rows.shift ? 1 : 0);
  const int64_t label = index_at(rows.labels, labels_offset(rows, at));
  if (label == rows.ignore_index) return kIgnored;
  if (label == kElsewhere) return kAbsent;
  return label < 0 || label >= rows.vocab ? kIgnored : label;
}

// The label that scores row n, or kIgnored or kAbsent.
KTO_HD int64_t label_of(const Rows& rows, int64_t n) {
  return label_within(rows, n, rows.shift ? sequence_range(rows, sequence_of(rows, n)).end : 0);
}

// How a logit x becomes the scaled logit z = softcap(x * logit_scale) / temperature: the kernels
// compute its score u, which is x or, under a softcap, tanh(inner * x), and z = outer * u.
struct Scale {
  float inner;  // logit_scale / softcap, used under a softcap only
  float outer;  // dz/du
  float slope;  // dz/dx, times 1 - u^2 under a softcap
  bool softcap;
};

// The gradient from above of each row's log-probability: given for each token, or as the gradient
// of each sequence's loss times the sequence's coefficient.
struct Gradient {
  const float* grad;          // (N,) without coefficients, else (B,) or one value
  int64_t grad_stride;        // 0: one value for all sequences
  const float* coefficients;  // (B,) or null
};

// The gradient of row n, in double: it is rounded only after the row's other factors.
KTO_HD double gradient_of(const Gradient& gradient, const Rows& rows, int64_t n) {
  if (gradient.coefficients == nullptr) return gradient.grad[n * gradient.grad_stride];
  const int64_t i = sequence_of(rows, n);
  const float coefficient = gradient.coefficients[i];
  // A saturated sequence has gradient 0 whatever arrives from above.
  return coefficient == 0 ? 0.0 : double(coefficient) * gradient.grad[i * gradient.grad_stride];
}

}  // namespace kto
