// Threads that share out one forward pass: hundreds of loops of a few microseconds each, too short to start a thread for.
//
// PyTorch's own threads are called in once for a pass. Until it is over the helpers spin, so that a loop starts within
// a fraction of a microsecond. Each member, the caller among them, has a run of pieces of its own: it reads one stretch
// of memory, and takes piece after piece from a counter of its own. Whoever is done takes what is left of the others': a
// helper that the machine keeps busy elsewhere delays nothing but the piece it holds, and where none comes
// the caller does all.

#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "tiles.h"

namespace speckv {

class Team {
public:
    explicit Team(int64_t threads) : threads_(threads), shares_(std::min(threads, kMostShares)) {}
    Team(const Team&) = delete;
    Team& operator=(const Team&) = delete;

    // Calls work(piece) for each piece of [0, pieces), spread over the team; returns when all are done. work must not
    // throw, and pieces must be fewer than 2^20.
    template <class Work>
    void run(int64_t pieces, const Work& work) {
        if (threads_ == 1 || pieces < 2) {
            for (int64_t piece = 0; piece < pieces; ++piece) {
                work(piece);
            }
            return;
        }
        share({[](const void* context, int64_t piece) { (*static_cast<const Work*>(context))(piece); }, &work}, pieces);
    }

    int64_t threads() const { return threads_; }

    // Works on whatever is shared until dismiss(), as this member, from 1 on.
    void help(int64_t member);
    void dismiss() { is_over_.store(true, std::memory_order_release); }

private:
    struct Job {
        void (*call)(const void*, int64_t);
        const void* context;
    };

    // Which loop it is, where a member's run of pieces ends, and which is next, in one word: 24, 20 and 20 bits. A helper
    // that comes late cannot take a piece of another loop than the one it saw.
    struct alignas(64) Share {
        std::atomic<uint64_t> ticket{0};
    };

    static constexpr int64_t kMostShares = 32;  // members beyond take what is left of the others'

    void share(Job job, int64_t pieces);
    int64_t work(int64_t member);

    Share tickets_[kMostShares];
    alignas(64) std::atomic<int64_t> pending_{0};
    std::atomic<bool> is_over_{false};
    const int64_t threads_, shares_;
    Job job_{};
};

// A loop is cut into several pieces a thread: enough that a slow thread is waited for briefly.
constexpr int64_t kPiecesPerThread = 8;

// Calls work(begin, end) for pieces of so many blocks of work.
template <class Work>
void for_each_piece(Team& team, int64_t blocks, const Work& work) {
    const int64_t piece = std::max<int64_t>(1, blocks / (kPiecesPerThread * team.threads()));
    team.run((blocks + piece - 1) / piece, [&](int64_t index) {
        work(index * piece, std::min((index + 1) * piece, blocks));
    });
}

// The same for what is done to each row of inputs beside the products: few are no work to share.
template <class Work>
void for_rows(Team& team, int64_t rows, const Work& work) {
    constexpr int64_t kFewRows = 8;
    if (rows <= kFewRows) {
        work(0, rows);
    } else {
        for_each_piece(team, rows, work);
    }
}

// Calls pass(team) with a team of PyTorch's number of threads, or of one where `elements` are not worth more.
template <class Pass>
void with_team(int64_t elements, const Pass& pass) {
    constexpr int64_t kElementsPerThread = int64_t{1} << 19;
    const int64_t threads = elements < 2 * kElementsPerThread ? 1 : torch::stable::get_num_threads();
    Team team(threads);
    if (threads == 1) {
        const TileUse use;
        pass(team);
        return;
    }
    torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
        const TileUse use;
        for (int64_t member = begin; member < end; ++member) {
            if (member > 0) {
                team.help(member);
                continue;
            }
            struct Dismissal {
                Team& team;
                ~Dismissal() { team.dismiss(); }
            } dismissal{team};
            pass(team);
        }
    });
}

}  // namespace speckv
