// What data/kernels.py calls for a model of integers. run_blocks is the whole step of a pass that reads a few tokens, with
// a cache of floats: read it first. Behind it run_round decodes a few, one after the other. A prompt's products are
// PyTorch's. Most are plain loops, of
// which a compiler makes vector instructions; dots and four_scores say their own (vpdpbusd multiplies and adds up 64
// bytes). What comes out for one token does not depend on the tokens beside it.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <vector>
#ifdef __AVX2__
#include <immintrin.h>
#endif

// e^x to the last digits of a float (Cephes); a call of std::exp would not be vectorised.
static inline float exp_of(float x) {
  x = x > 88.0f ? 88.0f : x < -87.0f ? -87.0f : x;
  float n = std::nearbyint(x * 1.44269504f);
  float f = x - n * 0.693359375f + n * 2.12194440e-4f;              // x = n log(2) + f
  float p = 1.9875691500e-4f;
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;                                         // e^f, which 2^n is multiplied with in its bits
  int32_t bits;
  std::memcpy(&bits, &p, 4);
  bits += (int32_t)n << 23;
  std::memcpy(&p, &bits, 4);
  return p;
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

#ifdef __AVX512F__
// The sums of the sixteen numbers in each of four vectors, of integers and of floats.
static inline __m128i added_up(const __m512i* x) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(x[0], x[1]), _mm512_unpackhi_epi32(x[0], x[1]));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(x[2], x[3]), _mm512_unpackhi_epi32(x[2], x[3]));
  __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

static inline __m128 added_up(const __m512* x) {
  __m512d a = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1])));
  __m512d b = _mm512_castps_pd(_mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3])));
  __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), high = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
  __m512 all = _mm512_add_ps(low, high);
  __m512 upper = _mm512_shuffle_f32x4(all, all, 0xee);
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_castps512_ps256(upper));
  return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}
#endif

// What model.norm multiplies x (n,) with.
static float norm_factor(const float* x, int n, float eps) {
  float sum = 0;
  #pragma omp simd reduction(+:sum)
  for (int i = 0; i < n; i++) sum += x[i] * x[i];
  return 1 / std::sqrt(sum / n + eps);
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

// One step of hadamard on sixteen numbers, which stay in a register: each number and the one half further on, or back,
// become their sum and their difference.
template <int half> static inline void butterflies(float* z) {
  float out[16];
  for (int i = 0; i < 16; i++) out[i] = z[i ^ half] + (i & half ? -z[i] : z[i]);
  std::memcpy(z, out, sizeof out);
}

// model.hadamard of z (K,), in place: sums and differences of neighbours, of pairs of them, and so on.
static void hadamard(float* z, int K, int n) {
  int half = 1;
  if (n >= 16) {
    for (int i = 0; i < K; i += 16) {
      butterflies<1>(z + i);
      butterflies<2>(z + i);
      butterflies<4>(z + i);
      butterflies<8>(z + i);
    }
    half = 16;
  }
  for (; half < n; half *= 2)
    for (int first = 0; first < K; first += 2 * half)
      for (int i = first; i < first + half; i++) {
        float a = z[i], b = z[i + half];
        z[i] = a + b;
        z[i + half] = a - b;
      }
}

// What a matrix reads: x itself, its norm, relu(x)^2, or silu(gate) * hidden, where x is gate and hidden. Hidden units
// are turned by Hadamard matrices of so many, if turned is not 0.
enum Input { AS_IT_IS, NORM, RELU2, SWIGLU };

static void prepare(const float* x, float* z, int K, int input, int turned, float eps) {
  float factor = input == NORM ? norm_factor(x, K, eps) : 1;
  if (input == RELU2)
    for (int k = 0; k < K; k++) z[k] = x[k] > 0 ? x[k] * x[k] : 0;
  else if (input == SWIGLU)
    #pragma omp simd
    for (int k = 0; k < K; k++) z[k] = x[k] / (1 + exp_of(-x[k])) * x[K + k];
  else
    for (int k = 0; k < K; k++) z[k] = x[k] * factor;
  hadamard(z, K, turned);
}

// data/rounding.round_rows of what a matrix reads of x (M, K or 2 K), for the threads of a parallel region together:
// xq (M, K), the integers plus zero, and xs (M,).
static void round_together(const float* x, uint8_t* xq, float* xs, int M, int K, int input, int turned, float eps,
                           int zero = 128) {
  static thread_local std::vector<float> room;
  room.resize(K);
  float* z = room.data();
  #pragma omp for schedule(static)
  for (int m = 0; m < M; m++) {
    prepare(x + (size_t)m * (input == SWIGLU ? 2 * K : K), z, K, input, turned, eps);
    float peak = 1e-12f;
    #pragma omp simd reduction(max:peak)
    for (int k = 0; k < K; k++) peak = std::fabs(z[k]) > peak ? std::fabs(z[k]) : peak;
    float up = 1 / peak * 127;                                      // PyTorch's 127 / peak, to the bit
    uint8_t* row = xq + (size_t)m * K;
    for (int k = 0; k < K; k++) row[k] = (uint8_t)((int32_t)std::nearbyint(z[k] * up) + zero);
    xs[m] = peak / 127;
  }
}

extern "C" void round_rows(const float* x, int8_t* xq, float* xs, int M, int K, int input, int turned, float eps) {
  #pragma omp parallel
  round_together(x, (uint8_t*)xq, xs, M, K, input, turned, eps, 0);
}

// What the steps -18, ..., 18 make of the sixteen values of 4 bits: one instruction looks up many of them.
static const struct Table {
  int8_t values[37][16];
  Table() { for (int s = 0; s < 37; s++) for (int q = 0; q < 16; q++) values[s][q] = (int8_t)((q - 8) * (s - 18)); }
  const int8_t* of(int step) const { return values[step + 18]; }
} table;

static int shift_of(int group) { return group == 32 ? 5 : group == 64 ? 6 : 7; }    // a division would take longer

#ifdef __AVX2__
static __m256i table_of(int step) {
  return _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table.of(step)));
}
#endif

// A row of 4 bits, as data/rounding.pack has it, and its groups' steps -> the int8 that it stands for, v (K,).
static void unpack_row(const uint8_t* w, const int8_t* step, int8_t* v, int K, int group) {
  int half = K / 2, shift = shift_of(group);
  for (int k = 0; k < half; k += 32) {
    int low = step[k >> shift], high = step[(half + k) >> shift];
#ifdef __AVX2__
    __m256i bytes = _mm256_loadu_si256((const __m256i*)(w + k)), four_bits = _mm256_set1_epi8(15);
    __m256i left = _mm256_and_si256(bytes, four_bits);
    __m256i right = _mm256_and_si256(_mm256_srli_epi16(bytes, 4), four_bits);
    _mm256_storeu_si256((__m256i*)(v + k), _mm256_shuffle_epi8(table_of(low), left));
    _mm256_storeu_si256((__m256i*)(v + half + k), _mm256_shuffle_epi8(table_of(high), right));
#else
    for (int i = k; i < k + 32; i++) {
      v[i] = table.of(low)[w[i] & 15];
      v[half + i] = table.of(high)[w[i] >> 4];
    }
#endif
  }
}

// All rows of a matrix of 4 bits -> v (N, K).
extern "C" void unpack(const uint8_t* w, const int8_t* step, int8_t* v, int N, int K, int group) {
  #pragma omp parallel for schedule(static)
  for (int n = 0; n < N; n++)
    unpack_row(w + (size_t)n * (K / 2), step + (size_t)n * (K / group), v + (size_t)n * K, K, group);
}

// A matrix of integers (rows, cols): int8, or 4 bits if there is a group. sums (rows,) are those of each row of
// integers, of which the 128 in the activations makes too much. data/kernels.py has the same structs.
struct Matrix {
  const uint8_t* weights;
  const int8_t* step;
  const int32_t* sums;
  const float* scale;
  int rows, cols, group;
};

// Four rows of a matrix, from row n on, times R rows of integers u, which lie m.cols apart -> their sums, those of row
// r from sums + 8 r on. What is read of u serves four rows, and what is read of a matrix R of them.
#ifdef __AVX512VNNI__
static const __mmask64 ALL = ~(__mmask64)0;

static inline __m512i read(const void* at, __mmask64 inside) {
  return inside == ALL ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8(inside, at);
}

// 64 products of each of four rows of weights v with each of the R rows, from column k on, or as many as are inside
template <int R> static inline void add(__m512i (*sum)[4], const uint8_t* u, int K, int k, const __m512i* v,
                                        __mmask64 inside) {
  for (int r = 0; r < R; r++) {
    __m512i few = read(u + (size_t)r * K + k, inside);
    for (int i = 0; i < 4; i++) sum[r][i] = _mm512_dpbusd_epi32(sum[r][i], few, v[i]);
  }
}

// The same of 4 bits, bytes that hold the columns k, ..., k + 63 and those half a row further on. What a step makes of
// 4 bits is looked up.
template <int R> static inline void add4(__m512i (*sum)[4], const uint8_t* u, int K, int k, const uint8_t* const* w,
                                         const int8_t* const* step, int shift, __mmask64 inside) {
  for (int side = 0; side < 2; side++) {
    int first = side * K / 2 + k, second = inside == ALL ? first + 32 : first;
    __m512i v[4];
    for (int i = 0; i < 4; i++) {
      __m512i bytes = read(w[i] + k, inside);
      __m512i q = _mm512_and_si512(side ? _mm512_srli_epi16(bytes, 4) : bytes, _mm512_set1_epi8(15));
      __m256i low = table_of(step[i][first >> shift]), high = table_of(step[i][second >> shift]);
      v[i] = _mm512_shuffle_epi8(_mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1), q);
    }
    add<R>(sum, u, K, first, v, inside);
  }
}

template <int R> static void dots(const Matrix& m, int n, const uint8_t* u, int32_t* sums) {
  const int K = m.cols, columns = m.group ? K / 2 : K, shift = shift_of(m.group);
  const uint8_t* w[4];
  const int8_t* step[4];
  for (int i = 0; i < 4; i++) {
    int row = std::min(n + i, m.rows - 1);                          // beyond the last one it is read again
    w[i] = m.weights + (size_t)row * columns;
    step[i] = m.group ? m.step + (size_t)row * (K / m.group) : nullptr;
  }
  __m512i sum[R][4];
  for (auto& of_row : sum)
    for (auto& s : of_row) s = _mm512_setzero_si512();
  auto read_columns = [&](int k, __mmask64 inside) {
    // rows further on are on their way from memory meanwhile: some of them with every product, since many requests at
    // once would be waited for
    for (int i = 0; i < 4; i++) _mm_prefetch((const char*)w[i] + k + 12 * columns, _MM_HINT_T1);
    if (m.group) return add4<R>(sum, u, K, k, w, step, shift, inside);
    __m512i v[4];
    for (int i = 0; i < 4; i++) v[i] = read(w[i] + k, inside);
    add<R>(sum, u, K, k, v, inside);
  };
  int k = 0;
  for (; k + 64 <= columns; k += 64) read_columns(k, ALL);
  if (k < columns) read_columns(k, ((__mmask64)1 << (columns - k)) - 1);
  for (int r = 0; r < R; r++)
    _mm_storeu_si128((__m128i*)(sums + 8 * r), added_up(sum[r]));
}
#else
template <int R> static void dots(const Matrix& m, int n, const uint8_t* u, int32_t* sums) {
  static thread_local std::vector<int8_t> unpacked;
  const int K = m.cols;
  for (int i = 0; i < 4 && n + i < m.rows; i++) {
    const int8_t* v = (const int8_t*)m.weights + (size_t)(n + i) * K;
    if (m.group) {
      unpacked.resize(K);
      unpack_row(m.weights + (size_t)(n + i) * (K / 2), m.step + (size_t)(n + i) * (K / m.group), unpacked.data(), K,
                 m.group);
      v = unpacked.data();
    }
    for (int r = 0; r < R; r++) {
      int32_t sum = 0;
      for (int k = 0; k < K; k++) sum += (int32_t)u[(size_t)r * K + k] * (int32_t)v[k];
      sums[8 * r + i] = sum;
    }
  }
}
#endif

// dots for any number of rows, at most five at once: so many sums stay in registers.
static void dots_of(const Matrix& m, int n, const uint8_t* u, int M, int32_t* sums) {
  for (; M > 5; M -= 4, u += (size_t)4 * m.cols, sums += 8 * 4) dots<4>(m, n, u, sums);
  switch (M) {
    case 1: return dots<1>(m, n, u, sums);
    case 2: return dots<2>(m, n, u, sums);
    case 3: return dots<3>(m, n, u, sums);
    case 4: return dots<4>(m, n, u, sums);
    case 5: return dots<5>(m, n, u, sums);
  }
}

// IntLinear, for the threads of a parallel region together: y (M, rows) of xq and xs, and rest (M, rows) is added, if
// there is one; it may be y itself.
static void multiply(const Matrix& m, const uint8_t* xq, const float* xs, const float* rest, float* y, int M) {
  std::vector<int32_t> sums((size_t)8 * M);                         // (M, 8)
  #pragma omp for schedule(static)
  for (int first = 0; first < m.rows; first += 8) {
    int end = first + 8 < m.rows ? first + 8 : m.rows;
    for (int n = first; n < end; n += 4) dots_of(m, n, xq, M, sums.data() + n - first);
    for (int r = 0; r < M; r++) {
      const int32_t* sum = sums.data() + 8 * r - first;
      for (int n = first; n < end; n++) {
        size_t at = (size_t)r * m.rows + n;
        float product = (float)(sum[n] - 128 * m.sums[n]) * m.scale[n] * xs[r];
        y[at] = rest ? product + rest[at] : product;
      }
    }
  }
}

// y (M, rows) of what the matrix reads of x.
extern "C" void int_linear(const Matrix* m, const float* x, const float* rest, float* y, int M, int input, int turned,
                           float eps) {
  std::vector<uint8_t> xq((size_t)M * m->cols);
  std::vector<float> xs(M);
  #pragma omp parallel
  {
    round_together(x, xq.data(), xs.data(), M, m->cols, input, turned, eps);
    multiply(*m, xq.data(), xs.data(), rest, y, M);
  }
}

// In what follows apart, width and y_apart say how many floats from the numbers of one query to those of the next one.

// The products of Q queries q (Q, D) with four keys k (4, D) -> scores (Q, 4): sixteen sums side by side, which then
// are added up in pairs.
#ifdef __AVX512F__
const int TOGETHER = 4;                                             // queries that attention reads keys and values for

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

// The sum of n values, each N numbers of D, times the shares that each of Q queries has of them (Q, n), is added to
// y (Q, N). N and Q are known beforehand, so that sums stay in registers.
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

// One head of R tokens in a row: queries q (R, D) over keys and values k and v, of which the first query sees n, the
// next one more, and so on -> y (R, D). What is read of k and v serves several queries at once, and a piece of them
// that stays near the processor serves all R.
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

// What multiply makes of its sums, for many rows, whose sums (M, N) PyTorch has made.
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

// Where the tokens of a step or a prompt stand: B rows of T tokens; row b has starts[b] tokens before them. cos and sin
// are (T, D), or (B, T, D) where rows are ragged.
struct Tokens {
  const float *cos, *sin;
  const int64_t* starts;
  int B, T, ragged;
};

// The heads of a block: H of queries, KV of keys and values, D wide, normed or not; size: the room of the cache.
struct Heads {
  int H, KV, D, size, normed;
  float eps;
};

// For the threads of a parallel region together: turns q and k of qkv (B, T, H + 2 KV, D), and writes k and v into the
// cache, keys and values (B, KV, size, D), behind the tokens before.
static void turn_and_keep(const Heads& h, const Tokens& at, float* qkv, float* keys, float* values) {
  const int heads = h.H + 2 * h.KV, D = h.D, T = at.T;
  #pragma omp for schedule(static)
  for (int i = 0; i < at.B * T * heads; i++) {
    int b = i / heads / T, t = i / heads % T, head = i % heads;
    size_t place = at.starts[b] + t, row = (at.ragged ? b * T : 0) + t;
    float* x = qkv + (size_t)i * D;
    if (head < h.H + h.KV) turn(x, at.cos + row * D, at.sin + row * D, D, h.normed, h.eps);
    if (head >= h.H) {
      float* store = head < h.H + h.KV ? keys : values;
      std::memcpy(store + (((size_t)b * h.KV + (head - h.H) % h.KV) * h.size + place) * D, x, D * sizeof(float));
    }
  }
}

// For the threads of a parallel region together: every query attends to the tokens up to its own, which is the rule of
// model.sees. q (B, T, heads, D), of which the first H are queries, and the cache -> y (B, T, H, D).
static void attend_together(const Heads& h, const Tokens& at, const float* q, int heads, const float* keys,
                            const float* values, float* y) {
  const int R = 16, parts = (at.T + R - 1) / R, D = h.D;            // of so many tokens, one head each
  #pragma omp for schedule(static)
  for (int i = 0; i < at.B * h.H * parts; i++) {
    int b = i / parts / h.H, head = i / parts % h.H, t = i % parts * R;
    size_t first = ((size_t)b * h.KV + head / (h.H / h.KV)) * h.size * D, row = (size_t)b * at.T + t;
    attend_some(q + (row * heads + head) * D, (size_t)heads * D, keys + first, values + first,
                y + (row * h.H + head) * D, (size_t)h.H * D, (int)at.starts[b] + t + 1, std::min(R, at.T - t), D);
  }
}

extern "C" void keep_and_attend(const Heads* h, const Tokens* at, float* qkv, float* keys, float* values, float* y) {
  #pragma omp parallel
  {
    turn_and_keep(*h, *at, qkv, keys, values);
    attend_together(*h, *at, qkv, h->H + 2 * h->KV, keys, values, y);
  }
}

extern "C" void attend(const Heads* h, const Tokens* at, const float* q, const float* keys, const float* values,
                       float* y) {
  #pragma omp parallel
  attend_together(*h, *at, q, h->H, keys, values, y);
}

// The matrices of a block. input: what the MLP does between its two.
struct Layer {
  Matrix c_qkv, attn_c_proj, c_fc, mlp_c_proj;
};

// All blocks of a model over the few tokens of a step: x (B, T, n_embd), in place. keys and values: those of each
// layer. One parallel region, whose threads wait for each other between the products: starting them anew for every
// product would take as long as the products of a small model.
extern "C" void run_blocks(const Layer* layers, int n_layer, float* const* keys, float* const* values,
                           const Heads* heads, const Tokens* at, float* x, int input, int turned) {
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
    turn_and_keep(*heads, *at, qkv.data(), keys[i], values[i]);
    attend_together(*heads, *at, qkv.data(), heads->H + 2 * heads->KV, keys[i], values[i], y.data());
    product(l.attn_c_proj, y.data(), AS_IT_IS, 0, x, x);
    product(l.c_fc, x, NORM, 0, nullptr, hidden.data());
    product(l.mlp_c_proj, hidden.data(), input, turned, x, x);
  }
}

// What is before the blocks and behind them: c_out has no rows where there is none; embed_norm says whether embeddings
// are normed, and logits are capped if softcap is not 0.
struct Ends {
  Matrix wte, c_out, lm_head;
  int embed_norm;
  float softcap;
};

// A row of a table -> x (cols,), as data/rounding.IntEmbedding has it.
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
// largest if that is not 0; of the logits alone where there is no noise.
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

// Reads a token, draws the next one, reads that, and so on, n times, of one text that has start tokens before: engine's
// step_plain in one call. cos and sin are those of all positions, noise is (n, V) or nothing at temperature 0
// -> tokens (n + 1,), of which the first is given, and states (n, n_embd).
extern "C" void run_round(const Layer* layers, int n_layer, float* const* keys, float* const* values,
                          const Heads* heads, const float* cos, const float* sin, int64_t start, int input, int turned,
                          const Ends* ends, const float* noise, float temperature, int top_k, int n, int64_t* tokens,
                          float* states) {
  const int width = ends->wte.cols, V = ends->lm_head.rows, D = heads->D;
  std::vector<float> x(width), read(width), logits(V);
  for (int t = 0; t < n; t++, start++) {
    embed(ends->wte, tokens[t], x.data());
    if (ends->embed_norm) norm_rows(x.data(), x.data(), 1, width, heads->eps);
    Tokens at = {cos + start * D, sin + start * D, &start, 1, 1, 0};
    run_blocks(layers, n_layer, keys, values, heads, &at, x.data(), input, turned);
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
