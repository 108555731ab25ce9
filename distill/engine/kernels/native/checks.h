// What is wrong with the numbers that an op takes as places in memory: pages, offsets, rows, experts.
//
// Every op looks before it begins. A wrong number is an error of the caller's, and must not become a read or a write
// outside the tensors. `check` returns a description, or null.
#pragma once

#include "arguments.h"

namespace {

const char* check_pages(const int64_t* table, int64_t width, int64_t length, int page_size, int pages) {
    if (length < 1 || length > width * page_size) return "a length is not covered by the page table";
    const int64_t used = (length + page_size - 1) / page_size;
    for (int64_t i = 0; i < used; i++)
        if (table[i] < 0 || table[i] >= pages) return "a page number is outside the pool";
    return nullptr;
}
const char* check_table(const int64_t* table, int64_t stride, int64_t width, const int64_t* length, int rows,
                        int page_size, int pages) {
    for (int row = 0; row < rows; row++)
        if (const char* wrong = check_pages(table + row * stride, width, length[row], page_size, pages)) return wrong;
    return nullptr;
}
const char* check_places(const int64_t* page, const int64_t* offset, int rows, int page_size, int pages) {
    for (int row = 0; row < rows; row++) {
        if (page[row] < 0 || page[row] >= pages) return "a page number is outside the pool";
        if (offset[row] < 0 || offset[row] >= page_size) return "an offset is outside the page";
    }
    return nullptr;
}
const char* check(const DecodeArgs& a) {
    return check_table(a.table, a.table_stride, a.table_width, a.length, a.rows, a.page_size, a.pages);
}
const char* check(const PrefillArgs& a) {
    if (a.rows > a.length) return "there are more queries than tokens in the context";
    return check_pages(a.table, a.table_width, a.length, a.page_size, a.pages);
}
const char* check(const IndexArgs& a) {
    if (a.rows > a.length) return "there are more queries than tokens in the context";
    return check_pages(a.table, a.table_width, a.length, a.page_size, a.pages);
}
const char* check(const WriteArgs& a) { return check_places(a.page, a.offset, a.rows, a.page_size, a.pages); }
const char* check(const StepArgs& a) {
    if (const char* wrong = check_places(a.page, a.offset, a.rows, a.page_size, a.pages)) return wrong;
    return check_table(a.table, a.table_stride, a.table_width, a.length, a.rows, a.page_size, a.pages);
}
const char* check(const ExpertsArgs& a) {
    for (int64_t i = 0, pairs = int64_t(a.tokens) * a.per_token; i < pairs; i++)
        if (a.expert[i] < 0 || a.expert[i] >= a.experts) return "the number of an expert is outside the bank";
    return nullptr;
}
const char* check(const DrawArgs& a) {
    for (int i = 0; i < a.draws; i++)
        if (a.row[i] < 0 || a.row[i] >= a.rows) return "the number of a row is outside the logits";
    return nullptr;
}
const char* check(const LikeliestArgs& a) {
    if (a.k < 0 || a.k > a.vocabulary) return "there are not as many tokens in the vocabulary";
    for (int64_t i = 0, count = int64_t(a.rows) * a.given_count; i < count; i++)
        if (a.given[i] < -1 || a.given[i] >= a.vocabulary) return "a token is outside the vocabulary";
    return nullptr;
}
const char* check(const RouteArgs& a) {
    return a.per_token < 1 || a.per_token > a.experts || a.groups < 1 || a.groups_kept < 1 ||
                   a.groups_kept > a.groups || a.experts % a.groups
               ? "experts cannot be grouped or chosen in these numbers"
               : nullptr;
}
const char* check(const DeltaArgs& a) {
    if (a.first[0] != 0 || a.first[a.sequences] != a.rows) return "the sequences do not have all rows";
    for (int i = 0; i < a.sequences; i++) {
        if (a.first[i + 1] < a.first[i]) return "a sequence has less than no rows";
        if (a.slot[i] < 0 || a.slot[i] >= a.slots) return "the number of a slot is outside the pool";
    }
    for (int i = 0; i < a.rows; i++)
        if (a.row[i] < 0 || a.row[i] >= a.rows) return "the number of a row is outside the batch";
    return nullptr;
}
template <class Args> const char* check(const Args&) { return nullptr; } // numbers that are no places

} // namespace
