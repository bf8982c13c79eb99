#include "kv/prefix_tree.h"

#include <xxhash.h>

#include <algorithm>
#include <bit>
#include <utility>

#include "base/check.h"
#include "base/reserve.h"

namespace triaxial {

uint64_t PrefixTree::DefaultHash(std::span<const ContentId> contents) {
  return XXH3_64bits(contents.data(), contents.size_bytes());
}

NodeId PrefixTree::FindRoot(std::string_view salt) const {
  const auto found = roots_.find(salt);
  return found == roots_.end() ? kNoNode : found->second;
}

void PrefixTree::Reserve(size_t children) { Grow(std::max(children, children_), roots_.size()); }

void PrefixTree::Grow(size_t children, size_t roots) {
  ReserveAtLeast(&nodes_, children + roots);
  ReserveAtLeast(&free_, nodes_.capacity());
  if (index_.size() < children) {
    std::vector<NodeId> index(std::bit_ceil(children), kNoNode);
    index_.swap(index);
    for (size_t i = 0; i < nodes_.size(); ++i) {
      if (nodes_[i].found) Enter(static_cast<NodeId>(i));
    }
  }
  while (nodes_.size() < children + roots) {
    free_.push_back(static_cast<NodeId>(nodes_.size()));
    nodes_.emplace_back();
  }
  children_ = children;
}

NodeId PrefixTree::AddRoot(std::string_view salt) {
  if (const NodeId found = FindRoot(salt); found != kNoNode) return found;
  Grow(children_, roots_.size() + 1);
  std::string name(salt);
  const auto root = roots_.emplace(name, kNoNode).first;
  const NodeId id = root->second = NewNode();
  nodes_[Index(id)].salt = std::move(name);
  nodes_[Index(id)].key = RootKey(salt);
  return id;
}

NodeId PrefixTree::AddChild(NodeId parent, std::span<const ContentId> contents, BlockId block) {
  const NodeId id = NewNode();
  Node& n = nodes_[Index(id)];
  n.parent = parent;
  n.block = block;
  n.key_of_index = KeyOf(parent, hash_(contents));
  n.found = true;
  Enter(id);
  ++nodes_[Index(parent)].children;
  return id;
}

void PrefixTree::Enter(NodeId id) {
  NodeId& first = index_[Bucket(node(id).key_of_index)];
  nodes_[Index(id)].next = std::exchange(first, id);
}

void PrefixTree::Hide(NodeId id) {
  Node& n = nodes_[Index(id)];
  if (!std::exchange(n.found, false)) return;
  NodeId* at = &index_[Bucket(n.key_of_index)];
  while (*at != id) {
    CHECK(*at != kNoNode);
    at = &nodes_[Index(*at)].next;
  }
  *at = n.next;
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
  CHECK(!free_.empty());
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
