/* y[t] += Bᵀ(A x[t]) for tokens that have different pairs A, B: every pair is read once, where it lies. */

#include <stdint.h>

#include "threads.h"

/* Tokens of one pair that share a pass over it. */
#define TOKENS 4
/* Ranks, and outputs, that are worked on while they are in the first cache. */
#define RANKS 64
#define OUTPUTS 512

typedef struct {
    int64_t m, n, stride; /* stride: from a token's y to the next one's */
    const float *x;
    float *y;
    const int64_t *ranks;             /* of every pair */
    const float *const *a, *const *b; /* of every pair: A (r, n) and Bᵀ (r, m) */
    const int64_t *pair, *first;      /* of every unit: its pair, and where its tokens begin; one more at the end */
    const int64_t *tokens;            /* of all units, one after another */
} Grouped;

static void add_unit(const Grouped *g, int64_t unit) {
    const int64_t pair = g->pair[unit], rank = g->ranks[pair], count = g->first[unit + 1] - g->first[unit];
    const int64_t *tokens = g->tokens + g->first[unit];
    float h[TOKENS][RANKS];
    for (int64_t low = 0; low < rank; low += RANKS) {
        const int64_t ranks = rank - low < RANKS ? rank - low : RANKS;
        const float *a = g->a[pair] + low * g->n, *b = g->b[pair] + low * g->m;
        for (int64_t k = 0; k < ranks; k++)
            for (int64_t t = 0; t < count; t++) {
                const float *x = g->x + tokens[t] * g->n, *row = a + k * g->n;
                float sum = 0;
                for (int64_t j = 0; j < g->n; j++) sum += row[j] * x[j];
                h[t][k] = sum;
            }
        for (int64_t i = 0; i < g->m; i += OUTPUTS) {
            const int64_t wide = g->m - i < OUTPUTS ? g->m - i : OUTPUTS;
            for (int64_t t = 0; t < count; t++) {
                float *restrict y = g->y + tokens[t] * g->stride + i;
                for (int64_t k = 0; k < ranks; k++) {
                    const float factor = h[t][k], *restrict row = b + k * g->m + i;
                    for (int64_t j = 0; j < wide; j++) y[j] += factor * row[j];
                }
            }
        }
    }
}

static void add_units(Job *job) {
    for (int64_t unit, end; take(job, &unit, &end);)
        for (; unit < end; unit++) add_unit(job->data, unit);
}

int add_grouped(int64_t units, int64_t m, int64_t n, int64_t stride, const float *x, float *y, const int64_t *ranks,
                const float *const *a, const float *const *b, const int64_t *pair, const int64_t *first,
                const int64_t *tokens, int threads) {
    const Grouped grouped = {m, n, stride, x, y, ranks, a, b, pair, first, tokens};
    Job job = {units, 0, add_units, &grouped};
    return run(&job, threads);
}
