// Which of the compiled instruction sets runs: asked of the CPU, or told.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "table.h"

namespace afds {

std::vector<std::string> usable_tables(bool bf16);  // names, the best first
// Throws std::invalid_argument where this CPU cannot run `isa`.
const Table &choose_table(const std::string &isa, bool bf16);
const PairTable &choose_pairs(const std::string &isa, const Table &table);
const AmxTable *choose_amx(const std::string &isa);  // or null
// Of from[0..n), those whose bit is set in `on`, one after the other; writes up to 31 numbers more.
void pick(uint16_t *to, const uint16_t *from, int n, const uint32_t *on, const int32_t *list, int picked);

}  // namespace afds
