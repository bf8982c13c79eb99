#include "kv/prefix_tree.h"

#include <xxhash.h>

#include "base/check.h"

namespace triaxial {

uint64_t PrefixTree::DefaultHash(std::span<const ContentId> contents) {
  return XXH3_64bits(contents.data(), contents.size_bytes());
}

NodeId PrefixTree::FindRoot(std::string_view salt) const {
  const auto found = roots_.find(salt);
  return found == roots_.end() ? kNoNode : found->second;
}

NodeId PrefixTree::AddRoot(std::string_view salt) {
  if (const NodeId found = FindRoot(salt); found != kNoNode) return found;
  const NodeId id = NewNode();
  nodes_[Index(id)].salt = salt;
  nodes_[Index(id)].key = RootKey(salt);
  roots_.emplace(salt, id);
  return id;
}

NodeId PrefixTree::AddChild(NodeId parent, std::span<const ContentId> contents, BlockId block) {
  const NodeId id = NewNode();
  Node& n = nodes_[Index(id)];
  n.parent = parent;
  n.block = block;
  n.key_of_index = KeyOf(parent, hash_(contents));
  n.found = true;
  ++nodes_[Index(parent)].children;
  index_.emplace(n.key_of_index, id);
  return id;
}

void PrefixTree::Hide(NodeId id) {
  Node& n = nodes_[Index(id)];
  if (!n.found) return;
  const auto [begin, end] = index_.equal_range(n.key_of_index);
  for (auto it = begin; it != end; ++it) {
    if (it->second != id) continue;
    index_.erase(it);
    n.found = false;
    return;
  }
  CHECK(false);
}

void PrefixTree::Remove(NodeId id) {
  CHECK(free_to_go(id) && !is_root(id));
  Hide(id);
  const NodeId parent = node(id).parent;
  FreeNode(id);
  --nodes_[Index(parent)].children;
  if (is_root(parent) && free_to_go(parent)) FreeNode(parent);
}

void PrefixTree::Unpin(NodeId id) {
  CHECK(nodes_[Index(id)].pins > 0);
  --nodes_[Index(id)].pins;
  if (is_root(id) && free_to_go(id)) FreeNode(id);
}

NodeId PrefixTree::NewNode() {
  if (free_.empty()) {
    free_.push_back(static_cast<NodeId>(nodes_.size()));
    nodes_.emplace_back();
  }
  const NodeId id = free_.back();
  free_.pop_back();
  nodes_[Index(id)].alive = true;
  return id;
}

void PrefixTree::FreeNode(NodeId id) {
  if (is_root(id)) roots_.erase(node(id).salt);
  nodes_[Index(id)] = {};
  free_.push_back(id);
}

}  // namespace triaxial
