// distill_loss: KL(p||q), KL(q||p) or their symmetric mean through (p + q) / 2, row by row, without the logits.
// Limit: the GEMMs: one forward for each model; backward both again and two for the student's gradients.
// The two KL stream: a block of rows meets a tile of the vocabulary of both models, and five numbers per row and tile
// remain. The Jensen-Shannon divergence takes the logarithm of a sum of p and q, so that both normalisers must stand
// before its first term; it holds both rows of logits over the whole vocabulary, kPairRows at a time.

#include "distill.h"

#include "linear_backward.h"

namespace hpsafety {

Kind distill_kind(std::string_view name) {
  if (name == "forward_kl") return Kind::kForward;
  if (name == "reverse_kl") return Kind::kReverse;
  TORCH_CHECK_VALUE(name == "jsd", "distill_loss: kind must be forward_kl, reverse_kl or jsd, got ", name);
  return Kind::kJsd;
}

void check_sides(const Tensor& student_hidden, const Tensor& student_weight, const Tensor& teacher_hidden,
                 const Tensor& teacher_weight) {
  const auto fits = [](const Tensor& h, const Tensor& w) {
    return h.dim() == 2 && w.dim() == 2 && h.size(1) == w.size(1) && h.scalar_type() == w.scalar_type();
  };
  TORCH_CHECK_VALUE(fits(student_hidden, student_weight) && fits(teacher_hidden, teacher_weight) &&
                        student_hidden.size(0) == teacher_hidden.size(0) &&
                        student_weight.size(0) == teacher_weight.size(0),
                    "distill_loss: expected hidden (N, D) and weight (V, D) of one dtype on each side, N and V common");
}

namespace {

constexpr int64_t kPairRows = 128;  // 50 MB for two rows of logits of 49,152 words; the GEMM keeps 96 % of its rate

// Of one row of one tile, for KL(a||b): both maxima and sums, and u = sum exp(da) (da - db) with d = z - m.
struct PairStats {
  float m_a, s_a, m_b, s_b, u;
};

PairStats tile_pair_stats(const float* a, const float* b, int64_t words) {
  const float m_a = row_max(a, words), m_b = row_max(b, words);
  if (!std::isfinite(m_a) || !std::isfinite(m_b)) return {m_a, 0, m_b, 0, 0};
  Vec s_a(0.f), s_b(0.f), u(0.f);
  for_lanes(words, [&](int64_t i, int64_t n) {
    const Vec da = load_lanes(a + i, n) - Vec(m_a), db = load_lanes(b + i, n) - Vec(m_b);
    const Vec ea = keep_lanes(da.exp(), n, 0.f);
    s_a = s_a + ea;
    s_b = s_b + keep_lanes(db.exp(), n, 0.f);
    u = u + where_positive(ea, ea * (da - db));
  });
  return {m_a, sum(s_a), m_b, sum(s_b), sum(u)};
}

float larger(float m, float v) { return (v > m || std::isnan(v)) ? v : m; }  // NaN wins and stays

struct Divergence {
  double m_a, log_a, m_b, log_b, kl;
};

// In tile order and fp64. A row whose maximum is not finite on either side has no softmax: NaN, as in torch.
Divergence merge_pairs(const PairStats* tiles, int64_t count, int64_t stride) {
  constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();
  float m_a = -std::numeric_limits<float>::infinity(), m_b = m_a;
  for (int64_t t = 0; t < count; ++t) {
    m_a = std::isnan(m_a) ? m_a : larger(m_a, tiles[t * stride].m_a);
    m_b = std::isnan(m_b) ? m_b : larger(m_b, tiles[t * stride].m_b);
  }
  if (!std::isfinite(m_a) || !std::isfinite(m_b)) return {m_a, kNaN, m_b, kNaN, kNaN};
  double s_a = 0, s_b = 0, u = 0;
  for (int64_t t = 0; t < count; ++t) {
    const PairStats& tile = tiles[t * stride];
    const double shift_a = static_cast<double>(tile.m_a) - m_a, shift_b = static_cast<double>(tile.m_b) - m_b;
    const double scale_a = std::exp(shift_a), scale_b = std::exp(shift_b);
    s_b += scale_b * tile.s_b;
    if (scale_a == 0) continue;
    s_a += scale_a * tile.s_a;
    u += scale_a * (tile.u + (shift_a - shift_b) * tile.s_a);
  }
  const double log_a = std::log(s_a), log_b = std::log(s_b);
  return {m_a, log_a, m_b, log_b, u / s_a - log_a + log_b};
}

// Rounding may take a divergence of nothing a little below zero; NaN stays.
double not_negative(double v) { return v < 0 ? 0 : v; }

struct Output {
  float* loss;
  double* norm;
  int64_t n;
};

// KL(a||b) of rows [first, first + n).
void stream_pairs(const Side& a, const Side& b, int64_t first, int64_t n, double alpha, const Blocks& words,
                  PairStats* stats) {
  const int64_t stride = padded(words.largest());
  const Blocks blocks(n, kRows);
  at::parallel_for(0, blocks.count * words.count, 1, [&](int64_t begin, int64_t end) {
    auto buffer = at::empty({2, blocks.largest(), stride}, at::kFloat);
    float *z_a = buffer.mutable_data_ptr<float>(), *z_b = z_a + blocks.largest() * stride;
    WordTile tile_a(a.weight, words, a.rows.bf16, WordTile::kLogits);
    WordTile tile_b(b.weight, words, b.rows.bf16, WordTile::kLogits);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t t = unit / blocks.count, block = unit % blocks.count;
      if (unit == begin || block == 0) tile_a.load(t), tile_b.load(t);
      const int64_t r0 = blocks.begin(block), r1 = blocks.end(block);
      tile_a.logits(a.rows, first + r0, first + r1, alpha, z_a, stride);
      tile_b.logits(b.rows, first + r0, first + r1, alpha, z_b, stride);
      for (int64_t r = r0; r < r1; ++r) {
        stats[t * n + r] = tile_pair_stats(z_a + (r - r0) * stride, z_b + (r - r0) * stride, tile_a.count);
      }
    }
  });
}

void streamed(const Side& student, const Side& teacher, bool reverse, double alpha, const Output& out) {
  const Side &a = reverse ? student : teacher, &b = reverse ? teacher : student;
  const Blocks words(student.weight.size(0), kWords), groups(out.n, kGroup);
  std::vector<PairStats> stats(words.count * groups.largest());
  for (int64_t g = 0; g < groups.count; ++g) {
    const int64_t r0 = groups.begin(g), count = groups.end(g) - r0;
    stream_pairs(a, b, r0, count, alpha, words, stats.data());
    at::parallel_for(0, count, 64, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        const Divergence d = merge_pairs(stats.data() + r, words.count, count);
        out.loss[r0 + r] = static_cast<float>(not_negative(d.kl));
        const RowNorm norm = reverse ? RowNorm{d.m_a, d.log_a, d.m_b, d.log_b, d.kl}
                                     : RowNorm{d.m_b, d.log_b, d.m_a, d.log_a, d.kl};
        store_norm(out.norm, out.n, r0 + r, norm);
      }
    });
  }
}

// Of one row of one tile: the parts of KL(p||m) and KL(q||m).
struct MeanParts {
  float p, q;
};

MeanParts tile_mean_parts(const float* z_q, const float* z_p, int64_t words, const LogRatio& row) {
  Vec from_p(0.f), from_q(0.f);
  for_lanes(words, [&](int64_t i, int64_t n) {
    const Vec vq = load_lanes(z_q + i, n), vp = load_lanes(z_p + i, n);
    const Vec q = keep_lanes(row.logq(vq).exp(), n, 0.f), p = keep_lanes(row.logp(vp).exp(), n, 0.f);
    const Vec x = row.x(vp, vq), distance = x.abs(), upper = log_over_mean(distance), lower = upper - distance;
    const Vec p_larger = x > Vec(0.f);
    from_p = from_p + where_positive(p, p * Vec::blendv(lower, upper, p_larger));
    from_q = from_q + where_positive(q, q * Vec::blendv(upper, lower, p_larger));
  });
  return {sum(from_p), sum(from_q)};
}

// One chunk of rows: both rows of logits over the whole vocabulary, (2, kPairRows, stride), student first.
class PairChunk {
 public:
  PairChunk(const Side& student, const Side& teacher, double alpha, const Blocks& words)
      : sides_{&student, &teacher}, alpha_(alpha), words_(words), stride_(padded(words.n)) {
    z_ = at::empty({2, kPairRows, stride_}, at::kFloat);
    stats_.resize(2 * words.count * kPairRows);
    parts_.resize(words.count * kPairRows);
  }

  void run(int64_t first, int64_t n, const Output& out) {
    logits(first, n);
    std::vector<RowNorm> norms(n);
    for (int64_t r = 0; r < n; ++r) {
      const Stats q = merge_stats(stats_.data() + r, words_.count, kPairRows);
      const Stats p = merge_stats(stats_.data() + words_.count * kPairRows + r, words_.count, kPairRows);
      norms[r] = {q.m, std::log(static_cast<double>(q.s)), p.m, std::log(static_cast<double>(p.s)), 0};
    }
    parts(n, norms);
    for (int64_t r = 0; r < n; ++r) {
      double from_p = 0, from_q = 0;
      for (int64_t t = 0; t < words_.count; ++t) {
        from_p += parts_[t * kPairRows + r].p;
        from_q += parts_[t * kPairRows + r].q;
      }
      if (!norms[r].finite()) from_q = from_p = std::numeric_limits<double>::quiet_NaN();
      norms[r].divergence = from_q;
      out.loss[first + r] = static_cast<float>(not_negative(0.5 * from_p + 0.5 * from_q));
      store_norm(out.norm, out.n, first + r, norms[r]);
    }
  }

 private:
  float* row(int64_t side, int64_t r) { return z_.mutable_data_ptr<float>() + (side * kPairRows + r) * stride_; }

  void logits(int64_t first, int64_t n) {
    for (int64_t s = 0; s < 2; ++s) {
      at::parallel_for(0, words_.count, 1, [&](int64_t begin, int64_t end) {
        WordTile tile(sides_[s]->weight, words_, sides_[s]->rows.bf16, WordTile::kLogits);
        for (int64_t t = begin; t < end; ++t) {
          tile.load(t);
          tile.logits(sides_[s]->rows, first, first + n, alpha_, row(s, 0) + tile.first, stride_);
          Stats* stats = stats_.data() + (s * words_.count + t) * kPairRows;
          for (int64_t r = 0; r < n; ++r) stats[r] = tile_stats<false, true>(row(s, r) + tile.first, tile.count);
        }
      });
    }
  }

  void parts(int64_t n, const std::vector<RowNorm>& norms) {
    at::parallel_for(0, words_.count, 1, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        const int64_t w0 = words_.begin(t), count = words_.end(t) - w0;
        for (int64_t r = 0; r < n; ++r) {
          parts_[t * kPairRows + r] = tile_mean_parts(row(0, r) + w0, row(1, r) + w0, count, LogRatio(norms[r]));
        }
      }
    });
  }

  const Side* sides_[2];
  double alpha_;
  const Blocks& words_;
  int64_t stride_;
  Tensor z_;
  std::vector<Stats> stats_;
  std::vector<MeanParts> parts_;
};

std::tuple<Tensor, Tensor> distill_loss(const Tensor& student_hidden, const Tensor& student_weight,
                                        const Tensor& teacher_hidden, const Tensor& teacher_weight,
                                        std::string_view kind_name, double temperature) {
  check_sides(student_hidden, student_weight, teacher_hidden, teacher_weight);
  const Kind kind = distill_kind(kind_name);
  const int64_t n = student_hidden.size(0);
  auto loss = at::empty({n}, student_hidden.options().dtype(at::kFloat));
  auto norm = at::empty({5, n}, student_hidden.options().dtype(at::kDouble));
  if (n == 0) return {loss, norm};
  const Side student(student_hidden, student_weight), teacher(teacher_hidden, teacher_weight);
  const Output out{loss.mutable_data_ptr<float>(), norm.mutable_data_ptr<double>(), n};
  if (kind != Kind::kJsd) {
    streamed(student, teacher, kind == Kind::kReverse, 1 / temperature, out);
    return {loss, norm};
  }
  const Blocks words(student.weight.size(0), kWords), chunks(n, kPairRows);
  PairChunk chunk(student, teacher, 1 / temperature, words);
  for (int64_t c = 0; c < chunks.count; ++c) chunk.run(chunks.begin(c), chunks.end(c) - chunks.begin(c), out);
  return {loss, norm};
}

}  // namespace

TORCH_LIBRARY_IMPL(hpsafety_cpu, CPU, m) { m.impl("distill_loss", &distill_loss); }

}  // namespace hpsafety
