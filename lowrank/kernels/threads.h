/* Rows of independent work on a few threads; since rows are independent, results do not depend on how many there are. */

#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>

/* Damping rises tenfold until a factorisation exists; beyond this many times the numbers were not finite. */
#define ATTEMPTS 12

#define GRAIN 8

/* Rows 0..rows-1, handed out GRAIN at a time; `work` takes them until none is left. */
typedef struct Job {
    int64_t rows;
    _Atomic int64_t next;
    void (*work)(struct Job *);
    const void *data;
} Job;

static inline int take(Job *job, int64_t *low, int64_t *high) {
    if (atomic_load(&job->next) >= job->rows) return 0;
    *low = atomic_fetch_add(&job->next, GRAIN);
    *high = *low + GRAIN < job->rows ? *low + GRAIN : job->rows;
    return *low < job->rows;
}

/* Work a job off on at most so many threads. Nonzero when rows are left because no thread had memory for its work. */
__attribute__((visibility("hidden"))) int run(Job *job, int threads);
