/* Attention of a step's tokens over their conversations' slots (kv_cache.py), on CPUs; loaded by
   attention.py.

   Keys and values are read where they lie, once for all query heads that share them and for up to BLOCK tokens that
   follow each other, as a prompt's do; sums are float32 whatever the numbers are. Every token's sums are divided at the
   same positions of its conversation, so that no bit depends on the others in its block or step or on the number of
   threads.

   Compiled with D (head dimension), G (query heads for each key/value head) and BFLOAT16 (0 or 1). */

#include <stdlib.h>

#include "numbers.h"

/* The head dimension, filled up to whole vectors with zeros. */
#define WIDTH ((D + 15) / 16 * 16)

/* Positions ahead of which keys and values are fetched: a processor does not do so by itself across pages. */
#define AHEAD 32

/* Tokens that share what is read, at most. Where there are many query heads these share enough, and a block's would not
   fit a thread's stack. */
#define BLOCK (G * D > 4096 ? 1 : 8)

/* The numbers of a head, or of a position for one. */
typedef float filled[WIDTH];

/* Vectors as long as the processor's, and the query heads whose sums over values fit its registers together. */
#ifdef __AVX512F__
#define LANES 16
#define HELD 24
#else
#ifdef __AVX__
#define LANES 8
#else
#define LANES 4
#endif
#define HELD 12
#endif
typedef float native __attribute__((vector_size(LANES * 4)));
#define FITTING (HELD * LANES / WIDTH ? HELD * LANES / WIDTH : 1)
#define HEADS (FITTING < G ? FITTING : G)

/* Ask for `rows` rows of D numbers ahead of their use; what lies beyond is harmless. */
static inline void fetch(const number *rows_D, int rows) {
    for (unsigned long at = 0; at < rows * D * sizeof(number); at += 64) __builtin_prefetch((const char *)rows_D + at);
}

#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int32_t places __attribute__((vector_size(64)));
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (places){__VA_ARGS__})
#endif

/* Two vectors whose lanes are to be summed become one: lanes `apart` from each other are added, a's where that bit of
   the lane's number is 0, b's where it is 1. */
#define EVERY(PICK, h) \
    PICK(0, h), PICK(1, h), PICK(2, h), PICK(3, h), PICK(4, h), PICK(5, h), PICK(6, h), PICK(7, h), \
    PICK(8, h), PICK(9, h), PICK(10, h), PICK(11, h), PICK(12, h), PICK(13, h), PICK(14, h), PICK(15, h)
#define NEAR(lane, h) ((lane) & (h) ? 16 + ((lane) ^ (h)) : (lane))
#define FAR(lane, h) ((lane) & (h) ? 16 + (lane) : (lane) ^ (h))
#define FOLD(a, b, apart) (SHUFFLE(a, b, EVERY(NEAR, apart)) + SHUFFLE(a, b, EVERY(FAR, apart)))

/* Scores of 16 keys: lane t is the product of `query` and the key at position t of `keys`. */
static inline floats score(const float *query, const filled *keys) {
    floats sums[16];
    for (int t = 0; t < 16; t++) {
        floats sum = {0};
        for (int d = 0; d < WIDTH; d += 16) {
            floats x, y;
            memcpy(&x, query + d, sizeof x);
            memcpy(&y, keys[t] + d, sizeof y);
            sum += x * y;
        }
        sums[t] = sum;
    }
    for (int t = 0; t < 8; t++) sums[t] = FOLD(sums[t], sums[t + 8], 8);
    for (int t = 0; t < 4; t++) sums[t] = FOLD(sums[t], sums[t + 4], 4);
    for (int t = 0; t < 2; t++) sums[t] = FOLD(sums[t], sums[t + 2], 2);
    return FOLD(sums[0], sums[1], 1);
}

/* A head turned to its position: `cosines` and `sines` have D numbers, as transformers' rotary embeddings do. */
static inline void rotate(const number *head, const number *cosines, const number *sines, float *out) {
    for (int d = 0; d < D / 2; d++) {
        float low = wide(head[d]), high = wide(head[d + D / 2]);
        out[d] = low * wide(cosines[d]) - high * wide(sines[d]);
        out[d + D / 2] = high * wide(cosines[d + D / 2]) + low * wide(sines[d + D / 2]);
    }
}

/* Keys or values of 16 positions in whole vectors: where they lie, or copied to `room`. */
static inline const filled *in_vectors(const number *rows_D, filled room[16]) {
#if BFLOAT16 || D % 16
    for (int t = 0; t < 16; t++)
        for (int d = 0; d < D; d++) room[t][d] = wide(rows_D[t * D + d]);
    return (const filled *)room;
#else
    return (const filled *)rows_D;
#endif
}

/* Add the values at positions from <= t < to of 16, each times its weight, to the sums of `heads` heads of a token. Rows
   of `ahead`, unless it is null, are asked for meanwhile. */
static inline __attribute__((always_inline)) void add_values(const int heads, const float *weights, long row,
                                                             const filled *values, int from, int to, filled *sums,
                                                             const number *ahead) {
    native held[HEADS][WIDTH / LANES];
    for (int h = 0; h < heads; h++)
        for (int v = 0; v < WIDTH / LANES; v++) memcpy(&held[h][v], sums[h] + v * LANES, sizeof held[h][v]);
    for (int t = from; t < to; t++) {
        if (ahead) fetch(ahead + t * D, 1);
        for (int v = 0; v < WIDTH / LANES; v++) {
            native value;
            memcpy(&value, values[t] + v * LANES, sizeof value);
            for (int h = 0; h < heads; h++) held[h][v] += weights[h * row + t] * value;
        }
    }
    for (int h = 0; h < heads; h++)
        for (int v = 0; v < WIDTH / LANES; v++) memcpy(sums[h] + v * LANES, &held[h][v], sizeof held[h][v]);
}

/* Scores of positions from <= t < to become powers of two, the largest 1, whose sum is returned. Whole vectors are
   worked on: of the first and the last one, what the token doesn't see becomes nothing. */
static inline float exponentials(float *weights, long from, long to) {
    float *first = __builtin_assume_aligned(weights + (from & -16), 64), largest = -INFINITY, sum = 0;
    long length = (to + 15 & -16) - (from & -16);
    for (long t = from & -16; t < from; t++) weights[t] = -INFINITY;
    for (long t = to; t < (to + 15 & -16); t++) weights[t] = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (long t = 0; t < length; t++) largest = first[t] > largest ? first[t] : largest;
#pragma omp simd reduction(+ : sum)
    for (long t = 0; t < length; t++) sum += first[t] = power_of_two(first[t] - largest);
    return sum;
}

/* Attention of `tokens` <= BLOCK tokens of a slot, at positions `at`, at + 1 and so on, for the G query heads of a
   key/value head. Scores are in base 2. `weights` is room for (BLOCK * G, row); tokens' outputs (G, D) lie `out_row`
   numbers apart. */
static void attend_block(int tokens, long at, long window, const filled *query, const number *keys_CD,
                         const number *values_CD, float *weights, long row, number *out, long out_row) {
    filled room[16] = {{0}}, sums[BLOCK * G];
    float totals[BLOCK * G];
    long begin = at + 1 > window ? at + 1 - window : 0, end = at + tokens;
    for (long first = begin & -16; first < end; first += 16) {
        fetch(keys_CD + (first + AHEAD) * D, 16);
        const filled *keys = in_vectors(keys_CD + first * D, room);
        for (int q = 0; q < tokens * G; q++) {
            __asm__("" : "+r"(keys)); /* else a compiler loads all 16 keys ahead of the loop, and spills them */
            floats scores = score(query[q], keys);
            memcpy(weights + q * row + first, &scores, sizeof scores);
        }
    }
    fetch(values_CD + begin * D, AHEAD);
    for (int q = 0; q < tokens * G; q++) {
        long to = at + q / G + 1;
        totals[q] = exponentials(weights + q * row, to > window ? to - window : 0, to);
    }
    memset(sums, 0, tokens * G * sizeof *sums);
    for (long first = begin & -16; first < end; first += 16) {
        const filled *values = in_vectors(values_CD + first * D, room);
        for (int q = 0; q < tokens * G; q += G) {
            long to = at + q / G + 1 - first, from = to > window ? to - window : 0;
            if (to > 16) to = 16;
            const number *ahead = q ? 0 : values_CD + (first + AHEAD) * D;
            for (int g = 0; g < G / HEADS * HEADS; g += HEADS, ahead = 0)
                add_values(HEADS, weights + (q + g) * row + first, row, values, from, to, sums + q + g, ahead);
            if (G % HEADS) {
                int g = G - G % HEADS;
                add_values(G % HEADS, weights + (q + g) * row + first, row, values, from, to, sums + q + g, 0);
            }
        }
    }
    for (int q = 0; q < tokens * G; q++)
        for (int d = 0; d < D; d++) out[q / G * out_row + q % G * D + d] = narrow(sums[q][d] / totals[q]);
}

/* Write the keys and values of a step's tokens to their slots, then attend: each token to the `window` last positions of
   its slot up to its own. N tokens, K key/value heads, C positions of a slot. Query (N, K, G, D), new keys and values
   (N, K, D), whose rows lie `row` numbers apart; slots' keys and values (S, K, C, D); out (N, K, G, D). Queries and new
   keys are turned by cosines and sines (N, D), unless these are null. Scores are multiplied by `scale`. Returns 0, or 1
   where there is no memory. */
int attend(int threads, long N, long K, long C, long window, float scale, long query_row, long key_row, long value_row,
           const int64_t *slots_N, const int64_t *positions_N, const number *query, const number *new_keys,
           const number *new_values, number *keys_SKCD, number *values_SKCD, const number *cosines_ND,
           const number *sines_ND, number *out) {
    int failed = 0;
    long blocks = 0, *begins = malloc(sizeof(long) * (N + 1));
    if (!begins) return 1;
    for (long token = 0; token < N; token++)
        if (!token || token == begins[blocks - 1] + BLOCK || slots_N[token] != slots_N[token - 1] ||
            positions_N[token] != positions_N[token - 1] + 1)
            begins[blocks++] = token;
    begins[blocks] = N;
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long task = 0; task < N * K; task++) {
            long token = task / K, head = task % K, place = ((slots_N[token] * K + head) * C + positions_N[token]) * D;
            const number *new_key = new_keys + token * key_row + head * D;
            memcpy(values_SKCD + place, new_values + token * value_row + head * D, D * sizeof(number));
            if (cosines_ND) {
                float turned[D];
                rotate(new_key, cosines_ND + token * D, sines_ND + token * D, turned);
                for (int d = 0; d < D; d++) keys_SKCD[place + d] = narrow(turned[d]);
            } else
                memcpy(keys_SKCD + place, new_key, D * sizeof(number));
        }
        /* Aligned, as loops may be divided where alignment begins; C is a multiple of 64. Caches hold few rows that lie
           powers of two apart. */
        long row = C + 16;
        float *weights = aligned_alloc(64, sizeof(float) * BLOCK * G * row);
#pragma omp for schedule(dynamic, 1)
        for (long task = 0; task < blocks * K; task++) {
            if (!weights) {
                failed = 1;
                continue;
            }
            long first = begins[task / K], head = task % K, slot = (slots_N[first] * K + head) * C * D;
            int tokens = begins[task / K + 1] - first;
            filled scaled[BLOCK * G];
            memset(scaled, 0, tokens * G * sizeof *scaled);
            for (int q = 0; q < tokens * G; q++) {
                long token = first + q / G;
                const number *given = query + token * query_row + (head * G + q % G) * D;
                if (cosines_ND)
                    rotate(given, cosines_ND + token * D, sines_ND + token * D, scaled[q]);
                else
                    for (int d = 0; d < D; d++) scaled[q][d] = wide(given[d]);
                for (int d = 0; d < D; d++) scaled[q][d] *= scale * LOG2_E;
            }
            attend_block(tokens, positions_N[first], window, (const filled *)scaled, keys_SKCD + slot,
                         values_SKCD + slot, weights, row, out + (first * K + head) * G * D, K * G * D);
        }
        free(weights);
    }
    free(begins);
    return failed;
}
