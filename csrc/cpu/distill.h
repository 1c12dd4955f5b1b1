// What the forward and the backward of distill_loss share: the two sides, and the numbers that normalise a row.
// p is the teacher, q the student, x = log p - log q.
#pragma once

#include "linear_softmax.h"

namespace hpsafety {

enum class Kind { kForward, kReverse, kJsd };
Kind distill_kind(std::string_view name);

// One model's rows and words; every side has its own width and dtype, and its own route through the GEMMs.
struct Side {
  Tensor weight;
  Rows rows;
  Side(const Tensor& hidden, const Tensor& weight)
      : weight(weight.contiguous()), rows(hidden, bf16_route(hidden, weight)) {}
};

void check_sides(const Tensor& student_hidden, const Tensor& student_weight, const Tensor& teacher_hidden,
                 const Tensor& teacher_weight);

// norm (5, N) fp64: of the student, then of the teacher, the largest logit m and log s = log sum exp(z - m); then the
// divergence that the gradient subtracts: KL(q||p), or KL(q||m) for the Jensen-Shannon divergence.
struct RowNorm {
  double m_q, log_q, m_p, log_p, divergence;
  bool finite() const { return std::isfinite(log_q) && std::isfinite(log_p); }
};
inline RowNorm load_norm(const double* norm, int64_t n, int64_t row) {
  return {norm[row], norm[n + row], norm[2 * n + row], norm[3 * n + row], norm[4 * n + row]};
}
inline void store_norm(double* norm, int64_t n, int64_t row, const RowNorm& v) {
  norm[row] = v.m_q, norm[n + row] = v.log_q, norm[2 * n + row] = v.m_p, norm[3 * n + row] = v.log_p;
  norm[4 * n + row] = v.divergence;
}

// log p, log q and x of a vector of words. Each logit meets its own row's largest first, then the two differences each
// other, and the normalisers join as one number made in fp64: a common offset of thousands costs no digit.
struct LogRatio {
  Vec m_q, log_q, m_p, log_p, shift;
  explicit LogRatio(const RowNorm& n)
      : m_q(static_cast<float>(n.m_q)),
        log_q(static_cast<float>(n.log_q)),
        m_p(static_cast<float>(n.m_p)),
        log_p(static_cast<float>(n.log_p)),
        shift(static_cast<float>(n.log_p - n.log_q)) {}
  Vec logq(Vec z_q) const { return (z_q - m_q) - log_q; }
  Vec logp(Vec z_p) const { return (z_p - m_p) - log_p; }
  Vec difference(Vec z_p, Vec z_q) const { return (z_p - m_p) - (z_q - m_q); }
  Vec x(Vec z_p, Vec z_q) const { return difference(z_p, z_q) - shift; }
};

// log(larger / m) of the words where p / q or q / p is exp(distance): -log((1 + exp(-distance)) / 2), to the last digits
// also where p and q all but agree. log(smaller / m) is this minus the distance.
inline Vec log_over_mean(Vec distance) {
  return (distance.neg().expm1() * Vec(0.5f)).log1p().neg();
}
// f where the probability is above zero, and the limit 0 where it has underflowed, whatever f is there.
inline Vec where_positive(Vec probability, Vec f) { return Vec::blendv(f, Vec(0.f), probability == Vec(0.f)); }

}  // namespace hpsafety
