// The functions that data/kernels.py calls for an integer model. Read run_blocks first: it takes the few tokens of a
// decoding step through all blocks. run_round, the last function, decodes several tokens, one after the other. This
// file has attention (four_scores is written with vector instructions), and what comes before and after the blocks; the
// products are in products.h. The result for a token never depends on the tokens beside it.
#include "products.h"
#include <functional>

// Below, apart, width and y_apart are distances in floats from one query's numbers to the next one's.

// The products of Q queries q (Q, D) with four keys k (4, D) -> scores (Q, 4). Each is summed as sixteen partial sums,
// which are added up in pairs at the end.
#ifdef __AVX512F__
const int TOGETHER = 4;                                             // queries that share a read of keys and values

template <int Q> static inline void four_scores(const float* q, size_t apart, const float* k, int D, float* scores,
                                                size_t width) {
  __m512 sum[Q][4];
  for (auto& of_query : sum)
    for (auto& s : of_query) s = _mm512_setzero_ps();
  auto add = [&](int i, __mmask16 inside) {
    __m512 keys[4];
    for (int j = 0; j < 4; j++) keys[j] = _mm512_maskz_loadu_ps(inside, k + (size_t)j * D + i);
    for (int r = 0; r < Q; r++) {
      __m512 a = _mm512_maskz_loadu_ps(inside, q + r * apart + i);
      for (int j = 0; j < 4; j++) sum[r][j] = _mm512_add_ps(sum[r][j], _mm512_mul_ps(a, keys[j]));
    }
  };
  int i = 0;
  for (; i + 64 <= D; i += 64) {                                    // the usual head has 64: a loop of one turn
    add(i, -1);
    add(i + 16, -1);
    add(i + 32, -1);
    add(i + 48, -1);
  }
  for (; i < D; i += 16) add(i, D - i < 16 ? (1 << (D - i)) - 1 : -1);
  for (int r = 0; r < Q; r++) _mm_storeu_ps(scores + r * width, added_up(sum[r]));
}
#else
const int TOGETHER = 1;

template <int Q> static inline void four_scores(const float* q, size_t, const float* k, int D, float* scores, size_t) {
  for (int key = 0; key < 4; key++, k += D) {
    float part[16] = {};
    int i = 0;
    for (; i + 16 <= D; i += 16)
      for (int j = 0; j < 16; j++) part[j] += q[i + j] * k[i + j];
    for (; i < D; i++) part[i % 16] += q[i] * k[i];
    for (int half = 8; half; half /= 2)
      for (int j = 0; j < half; j++) part[j] += part[j + half];
    scores[key] = part[0];
  }
}
#endif

// Adds to y (Q, N) the weighted sums of n values v, of each of which N numbers are used (of D). shares (Q, n): the
// weights of each query. N and Q are template parameters so that the sums stay in registers.
template <int Q, int N> static inline void mix(const float* shares, size_t width, const float* v, float* y,
                                               size_t y_apart, int n, int D) {
  float sum[Q][N];
  for (int r = 0; r < Q; r++) std::memcpy(sum[r], y + r * y_apart, sizeof sum[r]);
  for (int s = 0; s < n; s++, v += D)
    for (int r = 0; r < Q; r++)
      for (int i = 0; i < N; i++) sum[r][i] += shares[r * width + s] * v[i];
  for (int r = 0; r < Q; r++) std::memcpy(y + r * y_apart, sum[r], sizeof sum[r]);
}

template <int Q> static void mix_values(const float* shares, size_t width, const float* v, float* y, size_t y_apart,
                                        int n, int D) {
  int i = 0;
  for (; i + 64 <= D; i += 64) mix<Q, 64>(shares, width, v + i, y + i, y_apart, n, D);
  for (; i + 16 <= D; i += 16) mix<Q, 16>(shares, width, v + i, y + i, y_apart, n, D);
  for (; i < D; i++) mix<Q, 1>(shares, width, v + i, y + i, y_apart, n, D);
}

// Scores (n,) -> shares that add up to 1, in place.
static void softmax(float* scores, int n, float scale) {
  float peak = -INFINITY, total = 0;
  #pragma omp simd reduction(max:peak)
  for (int s = 0; s < n; s++) {
    scores[s] *= scale;
    peak = scores[s] > peak ? scores[s] : peak;
  }
  #pragma omp simd reduction(+:total)
  for (int s = 0; s < n; s++) {
    scores[s] = exp_of(scores[s] - peak);
    total += scores[s];
  }
  for (int s = 0; s < n; s++) scores[s] /= total;
}

// model.rotate of one head x (D,), in place, and model.norm behind it if it is normed.
static void turn(float* x, const float* cos, const float* sin, int D, int normed, float eps) {
  for (int i = 0, j = D / 2; j < D; i++, j++) {
    float a = x[i], b = x[j];
    x[i] = a * cos[i] + b * sin[i];
    x[j] = b * cos[j] + a * sin[j];
  }
  if (!normed) return;
  float factor = norm_factor(x, D, eps);
  for (int i = 0; i < D; i++) x[i] *= factor;
}

// Attention of one head for R tokens in a row: queries q (R, D) over keys k and values v, of which the first query sees
// n, the next one n + 1, and so on -> y (R, D). A key or value that is read serves several queries at once, and goes
// through them in pieces of 64, which stay in the cache for all R queries.
static void attend_some(const float* q, size_t apart, const float* k, const float* v, float* y, size_t y_apart, int n,
                        int R, int D) {
  static thread_local std::vector<float> room;
  const int all = n + R - 1, quads = R / TOGETHER * TOGETHER;
  const size_t width = all + 3;                                     // keys come in fours
  room.resize(R * width);
  float* scores = room.data();                                      // (R, width)
  for (int s = 0; s < all; s += 4) {
    const float* keys = k + (size_t)s * D;                          // up to 3 beyond the last: there is room
    float* at = scores + s;
    int r = std::max(0, s - n + 1) / TOGETHER * TOGETHER;           // the first query that sees one of them
    for (; r < quads; r += TOGETHER) four_scores<TOGETHER>(q + r * apart, apart, keys, D, at + r * width, width);
    for (; r < R; r++) four_scores<1>(q + r * apart, apart, keys, D, at + r * width, width);
  }
  for (int r = 0; r < R; r++) {
    softmax(scores + r * width, n + r, 1 / std::sqrt((float)D));
    std::fill(y + r * y_apart, y + r * y_apart + D, 0.0f);
  }
  for (int s = 0; s < all; s += 64) {
    auto seen = [&](int r) { return std::max(0, std::min(64, n + r - s)); };            // of these 64
    auto add = [&](int r, int from) {
      if (seen(r) == from) return;
      mix_values<1>(scores + r * width + s + from, width, v + (size_t)(s + from) * D, y + r * y_apart, y_apart,
                    seen(r) - from, D);
    };
    int r = 0;
    for (; r < quads; r += TOGETHER) {                              // what all of them see, then what the later ones do
      const int common = seen(r);
      mix_values<TOGETHER>(scores + r * width + s, width, v + (size_t)s * D, y + r * y_apart, y_apart, common, D);
      for (int later = r + 1; later < r + TOGETHER; later++) add(later, common);
    }
    for (; r < R; r++) add(r, 0);
  }
}

// Scales the sums (M, N) of a product that PyTorch has computed, as multiply does.
extern "C" void scale_sums(const int32_t* sums, const float* scale, const float* xs, const float* rest, float* y, int M,
                           int N) {
  #pragma omp parallel for schedule(static)
  for (int r = 0; r < M; r++)
    for (int n = 0; n < N; n++) {
      size_t at = (size_t)r * N + n;
      float product = (float)sums[at] * scale[n] * xs[r];
      y[at] = rest ? product + rest[at] : product;
    }
}

// The positions of the tokens of a step or a prompt: B rows of T tokens; row b has starts[b] tokens before them. cos
// and sin are (T, D), or (B, T, D) if rows differ in length (ragged).
struct Tokens {
  const float *cos, *sin;
  const int64_t* starts;
  int B, T, ragged;
};

// The heads of a block: H of queries, KV of keys and values, D wide; normed: q and k are; size: room in the cache.
struct Heads {
  int H, KV, D, size, normed;
  float eps;
};

// The cache of a layer: keys and values (B, KV, size, D), floats, or integers with a scale for each, (B, KV, size).
struct Store {
  void *keys, *values;
  float *key_scales, *value_scales;                                 // nullptr for floats
};

// Writes x (D,) in place number at.
static void keep(const float* x, void* store, float* scales, size_t at, int D) {
  if (scales) scales[at] = round_row(x, (uint8_t*)store + at * D, D, 0);
  else std::memcpy((float*)store + at * D, x, D * sizeof(float));
}

// n keys or values from place number first on, as floats; integers are converted into room.
static const float* floats(const void* store, const float* scales, size_t first, int n, int D,
                           std::vector<float>& room) {
  if (!scales) return (const float*)store + first * D;
  room.resize((size_t)(n + 3) * D);                                 // keys come in fours
  const int8_t* q = (const int8_t*)store + first * D;
  for (int s = 0; s < n; s++)
    for (int i = 0; i < D; i++) room[(size_t)s * D + i] = (float)q[(size_t)s * D + i] * scales[first + s];
  return room.data();
}

// Called by all threads of a parallel region: turns q and k of qkv (B, T, H + 2 KV, D), and appends k and v to the
// cache.
static void turn_and_keep(const Heads& h, const Tokens& at, float* qkv, const Store& store) {
  const int heads = h.H + 2 * h.KV, D = h.D, T = at.T;
  #pragma omp for schedule(static)
  for (int i = 0; i < at.B * T * heads; i++) {
    int b = i / heads / T, t = i / heads % T, head = i % heads;
    size_t row = (at.ragged ? b * T : 0) + t;
    size_t place = ((size_t)b * h.KV + (head - h.H) % h.KV) * h.size + at.starts[b] + t;
    float* x = qkv + (size_t)i * D;
    if (head < h.H + h.KV) turn(x, at.cos + row * D, at.sin + row * D, D, h.normed, h.eps);
    if (head >= h.H + h.KV) keep(x, store.values, store.value_scales, place, D);
    else if (head >= h.H) keep(x, store.keys, store.key_scales, place, D);
  }
}

// Called by all threads of a parallel region: every query of qkv attends to the tokens up to its own, which is the rule
// of model.sees -> y (B, T, H, D).
static void attend_together(const Heads& h, const Tokens& at, const float* qkv, const Store& store, float* y) {
  static thread_local std::vector<float> key_room, value_room;
  const int R = 16, parts = (at.T + R - 1) / R, D = h.D;            // a task is one head of up to R tokens
  const size_t apart = (size_t)(h.H + 2 * h.KV) * D;
  #pragma omp for schedule(static)
  for (int i = 0; i < at.B * h.H * parts; i++) {
    int b = i / parts / h.H, head = i / parts % h.H, t = i % parts * R, rows = std::min(R, at.T - t);
    size_t first = ((size_t)b * h.KV + head / (h.H / h.KV)) * h.size, row = (size_t)b * at.T + t;
    int n = (int)at.starts[b] + t + 1;                              // what the first of the queries sees
    const float* k = floats(store.keys, store.key_scales, first, n + rows - 1, D, key_room);
    const float* v = floats(store.values, store.value_scales, first, n + rows - 1, D, value_room);
    attend_some(qkv + row * apart + (size_t)head * D, apart, k, v, y + (row * h.H + head) * D, (size_t)h.H * D, n, rows,
                D);
  }
}

extern "C" void keep_and_attend(const Heads* h, const Tokens* at, float* qkv, const Store* store, float* y) {
  #pragma omp parallel
  {
    turn_and_keep(*h, *at, qkv, *store);
    attend_together(*h, *at, qkv, *store, y);
  }
}

// The matrices of a block.
struct Layer {
  Matrix c_qkv, attn_c_proj, c_fc, mlp_c_proj;
};

// Takes the few tokens of a step through all blocks: x (B, T, n_embd), in place. input: the MLP's activation function;
// turned: GPTConfig.hadamard. It is one parallel region, whose threads wait for each other between the products:
// starting threads anew for every product would take as long as the products of a small model.
extern "C" void run_blocks(const Layer* layers, const Store* stores, int n_layer, const Heads* heads, const Tokens* at,
                           float* x, int input, int turned) {
  const Layer& first = *layers;
  const int M = at->B * at->T, widest = std::max({first.c_qkv.cols, first.attn_c_proj.cols, first.mlp_c_proj.cols});
  std::vector<uint8_t> xq((size_t)M * widest);
  std::vector<float> xs(M), qkv((size_t)M * first.c_qkv.rows), y((size_t)M * first.attn_c_proj.cols);
  std::vector<float> hidden((size_t)M * first.c_fc.rows);
  #pragma omp parallel
  for (int i = 0; i < n_layer; i++) {
    const Layer& l = layers[i];
    auto product = [&](const Matrix& m, const float* in, int input, int turned, const float* rest, float* out) {
      round_together(in, xq.data(), xs.data(), M, m.cols, input, turned, heads->eps);
      multiply(m, xq.data(), xs.data(), rest, out, M);
    };
    product(l.c_qkv, x, NORM, 0, nullptr, qkv.data());
    turn_and_keep(*heads, *at, qkv.data(), stores[i]);
    attend_together(*heads, *at, qkv.data(), stores[i], y.data());
    product(l.attn_c_proj, y.data(), AS_IT_IS, 0, x, x);
    product(l.c_fc, x, NORM, 0, nullptr, hidden.data());
    product(l.mlp_c_proj, hidden.data(), input, turned, x, x);
  }
}

// tanh(x) to the last digits of a float (Cephes).
static inline float tanh_of(float x) {
  float z = x * x, far = 1 - 2 / (exp_of(2 * std::fabs(x)) + 1);
  float p = -5.70498872745e-3f;
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return std::fabs(x) < 0.625f ? x + x * z * p : x < 0 ? -far : far;
}

// model.norm of the rows of x (M, n).
extern "C" void norm_rows(const float* x, float* y, int M, int n, float eps) {
  #pragma omp parallel for schedule(static) if (M > 1)
  for (int m = 0; m < M; m++) {
    const float* row = x + (size_t)m * n;
    float factor = norm_factor(row, n, eps);
    for (int i = 0; i < n; i++) y[(size_t)m * n + i] = row[i] * factor;
  }
}

// model.softcap of y (n,), in place.
extern "C" void cap_all(float* y, int64_t n, float cap) {
  #pragma omp parallel for simd schedule(static) if (n > 10000)
  for (int64_t i = 0; i < n; i++) y[i] = cap * tanh_of(y[i] / cap);
}

// What comes before and after the blocks. c_out has no rows if there is none; embed_norm: embeddings are normed; logits
// are capped if softcap is not 0.
struct Ends {
  Matrix wte, c_out, lm_head;
  int embed_norm;
  float softcap;
};

// Looks up a row of a table -> x (cols,), as data/rounding.IntEmbedding does.
static void embed(const Matrix& table, int64_t row, float* x) {
  static thread_local std::vector<int8_t> unpacked;
  const int K = table.cols;
  const int8_t* v = (const int8_t*)table.weights + (size_t)row * K;
  if (table.group) {
    unpacked.resize(K);
    unpack_row(table.weights + (size_t)row * (K / 2), table.step + (size_t)row * (K / table.group), unpacked.data(), K,
               table.group);
    v = unpacked.data();
  }
  for (int k = 0; k < K; k++) x[k] = (float)v[k] * table.scale[row];
}

// data/sampling.draw of logits (V,), which are changed: the argmax of logits / temperature + noise, among the top_k
// largest logits if top_k is not 0. Without noise (temperature 0): the argmax of the logits.
static int64_t draw(float* logits, const float* noise, int V, float temperature, int top_k) {
  float least = -INFINITY;
  if (noise) {
    for (int i = 0; i < V; i++) logits[i] /= temperature;
    if (top_k && top_k < V) {
      std::vector<float> sorted(logits, logits + V);
      std::nth_element(sorted.begin(), sorted.begin() + top_k - 1, sorted.end(), std::greater<float>());
      least = sorted[top_k - 1];
    }
  }
  int64_t best = 0;
  float most = -INFINITY;
  for (int i = 0; i < V; i++) {
    float score = noise ? logits[i] + noise[i] : logits[i];
    if (logits[i] >= least && score > most) {
      most = score;
      best = i;
    }
  }
  return best;
}

// engine.step_plain in one call, for one text with start tokens in the cache: n times it reads a token and draws the
// next. cos and sin are those of all positions; noise is (n, V), or nullptr at temperature 0 -> tokens (n + 1,), of
// which the first is given, and states (n, n_embd).
extern "C" void run_round(const Layer* layers, const Store* stores, int n_layer, const Heads* heads, const float* cos,
                          const float* sin, int64_t start, int input, int turned, const Ends* ends, const float* noise,
                          float temperature, int top_k, int n, int64_t* tokens, float* states) {
  const int width = ends->wte.cols, V = ends->lm_head.rows, D = heads->D;
  std::vector<float> x(width), read(width), logits(V);
  for (int t = 0; t < n; t++, start++) {
    embed(ends->wte, tokens[t], x.data());
    if (ends->embed_norm) norm_rows(x.data(), x.data(), 1, width, heads->eps);
    Tokens at = {cos + start * D, sin + start * D, &start, 1, 1, 0};
    run_blocks(layers, stores, n_layer, heads, &at, x.data(), input, turned);
    float* state = states + (size_t)t * width;
    norm_rows(x.data(), state, 1, width, heads->eps);
    const float* last = state;
    if (ends->c_out.rows) {                                         // model.before_head
      int_linear(&ends->c_out, state, state, read.data(), 1, AS_IT_IS, 0, heads->eps);
      last = read.data();
    }
    int_linear(&ends->lm_head, last, nullptr, logits.data(), 1, AS_IT_IS, 0, heads->eps);
    if (ends->softcap) cap_all(logits.data(), V, ends->softcap);
    tokens[t + 1] = draw(logits.data(), noise ? noise + (size_t)t * V : nullptr, V, temperature, top_k);
  }
}
