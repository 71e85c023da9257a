/* y = x Wᵀ in fp32 for the few tokens of a decode step: W is read once, and every weight is multiplied by all tokens at
   a time. Memory is far, and rows are too short for the processor to see where they lead: the next ones are asked for
   while these are worked on. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "threads.h"
#include "tokens.h"

typedef float v16 __attribute__((vector_size(64), aligned(4), may_alias));

#ifdef __AVX512F__
#define GROUP 8 /* 32 vector registers */
#else
#define GROUP 4
#endif
/* Tokens side by side in a register. */
#define WIDTH 16

typedef struct {
    int64_t tokens, m, n;
    const float *x; /* (tokens, n), or (n, WIDTH) for more than four */
    const float *w;
    float *y; /* (tokens, m) */
} Dense;

/* One to four tokens: two rows at a time against each token. */
#define DEFINE_ROWS(T)                                                                                 \
    static void rows_##T(Job *job) {                                                                   \
        const Dense *d = job->data;                                                                    \
        const int64_t n = d->n, whole = n - n % 32;                                                    \
        for (int64_t pair, end; take(job, &pair, &end);)                                               \
            for (; pair < end; pair++) {                                                               \
                const int64_t rows[2] = {2 * pair, 2 * pair + 1 < d->m ? 2 * pair + 1 : 2 * pair};     \
                const float *w[2] = {d->w + rows[0] * n, d->w + rows[1] * n};                          \
                const int64_t ahead = (rows[1] + 2 < d->m ? 2 : 0) * n;                                \
                v16 sums[T][2][2];                                                                     \
                memset(sums, 0, sizeof sums);                                                          \
                for (int64_t j = 0; j < whole; j += 32)                                                \
                    for (int r = 0; r < 2; r++) {                                                      \
                        __builtin_prefetch(w[r] + ahead + j);                                          \
                        __builtin_prefetch(w[r] + ahead + j + 16);                                     \
                        const v16 first = *(const v16 *)(w[r] + j), second = *(const v16 *)(w[r] + j + 16); \
                        for (int t = 0; t < T; t++) {                                                  \
                            const float *x = d->x + t * n + j;                                         \
                            sums[t][r][0] += first * *(const v16 *)x;                                  \
                            sums[t][r][1] += second * *(const v16 *)(x + 16);                          \
                        }                                                                              \
                    }                                                                                  \
                for (int t = 0; t < T; t++)                                                            \
                    for (int r = 0; r < 2; r++) {                                                      \
                        const v16 both = sums[t][r][0] + sums[t][r][1];                                \
                        float sum = 0;                                                                 \
                        for (int k = 0; k < 16; k++) sum += both[k];                                   \
                        for (int64_t j = whole; j < n; j++) sum += w[r][j] * d->x[t * n + j];          \
                        d->y[t * d->m + rows[r]] = sum;                                                \
                    }                                                                                  \
            }                                                                                          \
    }
DEFINE_ROWS(1)
DEFINE_ROWS(2)
DEFINE_ROWS(3)
DEFINE_ROWS(4)

/* Five to sixteen tokens: GROUP rows are walked down, every weight times all tokens at once. */
static void columns(Job *job) {
    const Dense *d = job->data;
    const int64_t n = d->n;
    for (int64_t group, end; take(job, &group, &end);)
        for (; group < end; group++) {
            const int64_t low = group * GROUP, rows = d->m - low < GROUP ? d->m - low : GROUP;
            const float *w[GROUP];
            for (int r = 0; r < GROUP; r++) w[r] = d->w + (low + (r < rows ? r : 0)) * n;
            v16 sums[GROUP];
            memset(sums, 0, sizeof sums);
            const int64_t ahead = (low + 2 * GROUP <= d->m ? GROUP : 0) * n;
            for (int64_t at = 0; at < n; at += 16) {
                for (int r = 0; r < GROUP; r++) __builtin_prefetch(w[r] + ahead + at);
                const int64_t stop = at + 16 < n ? at + 16 : n;
                for (int64_t j = at; j < stop; j++) {
                    const v16 x = *(const v16 *)(d->x + j * WIDTH);
                    for (int r = 0; r < GROUP; r++) sums[r] += w[r][j] * x;
                }
            }
            for (int64_t t = 0; t < d->tokens; t++)
                for (int r = 0; r < rows; r++) d->y[t * d->m + low + r] = sums[r][t];
        }
}

/* x (tokens, n), W (m, n) -> y (tokens, m); one to sixteen tokens. Nonzero: not done. The bits of a token do not depend
   on `threads`. */
int product_dense(int64_t tokens, int64_t m, int64_t n, const float *x, const float *w, float *y, int threads) {
    static void (*const by_rows[])(Job *) = {NULL, rows_1, rows_2, rows_3, rows_4};
    if (tokens < 1 || tokens > WIDTH) return 1;
    Dense dense = {tokens, m, n, x, w, y};
    Job job = {(m + 1) / 2, 0, NULL, &dense};
    if (tokens <= 4) {
        job.work = by_rows[tokens];
        return run(&job, threads);
    }
    float *turned = side_by_side(x, tokens, n, WIDTH);
    if (turned == NULL) return 1;
    dense.x = turned;
    job.rows = (m + GROUP - 1) / GROUP;
    job.work = columns;
    const int failed = run(&job, threads);
    free(turned);
    return failed;
}
