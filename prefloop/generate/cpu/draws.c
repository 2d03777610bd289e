/* What a draw must know of each row of logits, in one pass over it while it is in the cache; loaded by draws.py.
   Compiled with BFLOAT16 = 0. */

#include <stdlib.h>

#include "numbers.h"

/* A logit and its token as one number: a greater one is a larger logit or, of equal ones, a lower token. NaN is largest. */
static inline uint64_t key_of(float logit, uint32_t token) {
    uint32_t bits;
    logit += 0.0f; /* -0 equals 0 */
    memcpy(&bits, &logit, sizeof bits);
    if (logit != logit) bits = 0x7fffffff;
    bits = bits >> 31 ? ~bits : bits | 0x80000000u;
    return (uint64_t)bits << 32 | (0xffffffffu - token);
}

static int descending(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x < y) - (x > y);
}

/* Reorder n keys so that the `count` greatest come first, in any order (Hoare's selection). */
static void select_greatest(uint64_t *keys, long n, long count) {
    long low = 0, high = n - 1;
    while (low < high) {
        uint64_t pivot = keys[low + (high - low) / 2];
        long i = low, j = high;
        while (i <= j) {
            while (keys[i] > pivot) i++;
            while (keys[j] < pivot) j--;
            if (i <= j) {
                uint64_t swap = keys[i];
                keys[i++] = keys[j];
                keys[j--] = swap;
            }
        }
        if (count - 1 <= j)
            high = j;
        else if (count - 1 >= i)
            low = i;
        else
            return;
    }
}

/* Sums that are taken side by side. */
#define LANES 64

/* log sum exp of V logits times `scale`, none of which is above `largest`. */
static float log_sum(const float *logits, long V, float largest, float scale) {
    float sums[LANES] = {0}, sum = 0;
    long v = 0;
    for (; v + LANES <= V; v += LANES)
        for (int lane = 0; lane < LANES; lane++) sums[lane] += power_of_two((logits[v + lane] - largest) * scale * LOG2_E);
    for (; v < V; v++) sum += power_of_two((logits[v] - largest) * scale * LOG2_E);
    for (int lane = 0; lane < LANES; lane++) sum += sums[lane];
    return largest * scale + logf(sum);
}

/* The C greatest logits of a row in descending order, of equal ones the lower token first. `keys` is room for V.

   The C-th greatest of the maxima of disjoint sets is no more than the C-th greatest of all, so only what reaches it
   need be compared. */
static void greatest(const float *logits, long V, long C, uint64_t *keys, float *values_C, int64_t *ids_C) {
    /* Some eight times as many sets as are wanted, of the lanes of neighbouring vectors. */
    long vectors = V / 16, each = vectors * 16 / (8 * C) + 1, sets = 0;
    for (long first = 0; first < vectors; first += each) {
        float most[16];
        memcpy(most, logits + first * 16, sizeof most);
        for (long at = first + 1; at < first + each && at < vectors; at++)
            for (int lane = 0; lane < 16; lane++) {
                float x = logits[at * 16 + lane];
                most[lane] = x > most[lane] ? x : most[lane];
            }
        for (int lane = 0; lane < 16; lane++) keys[sets++] = key_of(most[lane], 0);
    }
    float least = -INFINITY;
    if (sets >= C) {
        select_greatest(keys, sets, C);
        uint64_t smallest = keys[0];
        for (long c = 1; c < C; c++) smallest = keys[c] < smallest ? keys[c] : smallest;
        uint32_t bits = smallest >> 32;
        bits = bits >> 31 ? bits & 0x7fffffffu : ~bits;
        memcpy(&least, &bits, sizeof least);
    }
    long found = 0;
    for (long first = 0; first < V; first += LANES) {
        long end = first + LANES < V ? first + LANES : V;
        int any = 0;
        for (long v = first; v < end; v++) any |= !(logits[v] < least);
        if (any)
            for (long v = first; v < end; v++)
                if (!(logits[v] < least)) keys[found++] = key_of(logits[v], v);
    }
    select_greatest(keys, found, C);
    qsort(keys, C, sizeof *keys, descending);
    for (long c = 0; c < C; c++) {
        ids_C[c] = 0xffffffffu - (uint32_t)keys[c];
        values_C[c] = logits[ids_C[c]];
    }
}

/* Of logits (B, V): log sum exp (B,) at temperature 1 and of logits times `scale`, and the C < V greatest with their
   tokens, (B, C). Returns 0, or 1 where there is no memory. */
int survey(int threads, long B, long V, long C, float scale, const float *logits, float *totals_B, float *scaled_B,
           float *values_BC, int64_t *ids_BC) {
    int failed = 0;
#pragma omp parallel num_threads(threads)
    {
        uint64_t *keys = malloc(sizeof *keys * V);
#pragma omp for schedule(dynamic, 1)
        for (long b = 0; b < B; b++) {
            if (!keys) {
                failed = 1;
                continue;
            }
            const float *row = logits + b * V;
            greatest(row, V, C, keys, values_BC + b * C, ids_BC + b * C);
            float largest = values_BC[b * C];
            totals_B[b] = log_sum(row, V, largest, 1.0f);
            scaled_B[b] = scale == 1.0f ? totals_B[b] : log_sum(row, V, largest, scale);
        }
        free(keys);
    }
    return failed;
}
