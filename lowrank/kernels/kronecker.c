/* y[t] += vec(W1 X W2ᵀ) for tokens that have different factors W1, W2; X is x[t] as a matrix, W2 is full or W2a W2b. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"

typedef struct {
    int64_t m, n, stride, most; /* stride: from a token's y to the next one's; most: numbers of the largest T and H */
    const float *x;
    float *y;
    const int64_t *sizes;                /* of every adapter: up, uq, vp, vq, r; r = 0 where W2 is full */
    const float *const *w1, *const *in; /* W1 (up, uq); W2bᵀ (vq, r), or W2ᵀ (vq, vp) */
    const float *const *out;             /* W2aᵀ (r, vp); unused where W2 is full */
    const int64_t *adapter, *token;      /* of every unit */
} Kronecker;

static void add_rows(float *restrict to, float factor, const float *restrict row, int64_t size) {
    for (int64_t k = 0; k < size; k++) to[k] += factor * row[k];
}

static void add_token(const Kronecker *g, int64_t unit, float *inner, float *mixed) {
    const int64_t own = g->adapter[unit], *size = g->sizes + 5 * own;
    const int64_t up = size[0], uq = size[1], vp = size[2], vq = size[3], wide = size[4] > 0 ? size[4] : vp;
    const float *x = g->x + g->token[unit] * g->n, *w1 = g->w1[own];
    float *y = g->y + g->token[unit] * g->stride;
    memset(inner, 0, (size_t)(uq * wide) * sizeof(float));
    for (int64_t i = 0; i < uq; i++)
        for (int64_t j = 0; j < vq; j++) add_rows(inner + i * wide, x[i * vq + j], g->in[own] + j * wide, wide);
    for (int64_t u = 0; u < up; u++) {
        float *to = size[4] > 0 ? mixed : y + u * vp;
        if (size[4] > 0) memset(mixed, 0, (size_t)wide * sizeof(float));
        for (int64_t i = 0; i < uq; i++) add_rows(to, w1[u * uq + i], inner + i * wide, wide);
        for (int64_t k = 0; k < size[4]; k++) add_rows(y + u * vp, mixed[k], g->out[own] + k * vp, vp);
    }
}

static void add_tokens(Job *job) {
    const Kronecker *g = job->data;
    float *inner = malloc((size_t)(2 * g->most) * sizeof(float));
    if (inner == NULL) return;
    for (int64_t unit, end; take(job, &unit, &end);)
        for (; unit < end; unit++) add_token(g, unit, inner, inner + g->most);
    free(inner);
}

/* Nonzero: not done for want of memory, perhaps in part. */
int add_kronecker(int64_t units, int64_t m, int64_t n, int64_t stride, int64_t most, const float *x, float *y,
                  const int64_t *sizes, const float *const *w1, const float *const *in, const float *const *out,
                  const int64_t *adapter, const int64_t *token, int threads) {
    const Kronecker grouped = {m, n, stride, most, x, y, sizes, w1, in, out, adapter, token};
    Job job = {units, 0, add_tokens, &grouped};
    return run(&job, threads);
}
