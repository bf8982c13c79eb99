// The prefixes that the cache knows: a tree whose nodes are complete blocks, a root for each salt. A hash
// only finds candidates; the contents and the parent decide. Only Reserve and AddRoot ask for memory; where
// it is missing, nothing has changed.
#ifndef TRIAXIAL_KV_PREFIX_TREE_H_
#define TRIAXIAL_KV_PREFIX_TREE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "kv/block.h"

namespace triaxial {

class PrefixTree {
 public:
  using Hash = uint64_t (*)(std::span<const ContentId>);
  // Tests pass a hash that collides always.
  explicit PrefixTree(Hash hash = DefaultHash) : hash_(hash) {}
  static uint64_t DefaultHash(std::span<const ContentId> contents);

  // For so many nodes besides the roots.
  void Reserve(size_t children);
  NodeId FindRoot(std::string_view salt) const;  // kNoNode if there is none
  NodeId AddRoot(std::string_view salt);         // the one there is, else a new one
  // The child with these contents; `same` compares them with a candidate's block.
  template <typename Same>
  NodeId FindChild(NodeId parent, std::span<const ContentId> contents, const Same& same) const {
    const uint64_t key = KeyOf(parent, hash_(contents));
    for (NodeId id = index_.empty() ? kNoNode : index_[Bucket(key)]; id != kNoNode; id = node(id).next) {
      const Node& n = node(id);
      if (n.key_of_index == key && n.parent == parent && same(n.block)) return id;
    }
    return kNoNode;
  }
  // There must be memory for it (CHECK).
  NodeId AddChild(NodeId parent, std::span<const ContentId> contents, BlockId block);
  // Nobody finds the node any more, nor what is below it. It stays until it is removed.
  void Hide(NodeId id);
  // Removes a node without children and pins, and then its root if that has none either.
  void Remove(NodeId id);

  BlockId block(NodeId id) const { return node(id).block; }
  bool found(NodeId id) const { return node(id).found; }  // false once hidden
  void set_block(NodeId id, BlockId block) { nodes_[Index(id)].block = block; }
  NodeId parent(NodeId id) const { return node(id).parent; }
  bool is_root(NodeId id) const { return node(id).parent == kNoNode; }
  int32_t children(NodeId id) const { return node(id).children; }
  bool free_to_go(NodeId id) const { return node(id).children == 0 && node(id).pins == 0; }
  // A sequence continues here, so that the node must stay.
  void Pin(NodeId id) { ++nodes_[Index(id)].pins; }
  // A root without anything left goes.
  void Unpin(NodeId id);
  int32_t pins(NodeId id) const { return node(id).pins; }
  // Reasons why a node and those above it must stay, kept by the cache: its pins, sequences that hold its
  // block (one reason for all), and each child that is needed. `by` is 1 or -1; true if that changed whether
  // the node is needed.
  bool CountReason(NodeId id, int32_t by) {
    const bool before = needed(id);
    nodes_[Index(id)].reasons += by;
    return needed(id) != before;
  }
  int32_t reasons(NodeId id) const { return node(id).reasons; }
  bool needed(NodeId id) const { return node(id).reasons > 0; }
  // The block's name at rest; `contents_of` gives the contents of a node's block.
  template <typename ContentsOf>
  BlockKey Key(NodeId id, const ContentsOf& contents_of) {
    Node& n = nodes_[Index(id)];
    if (!n.key) n.key = ChildKey(Key(n.parent, contents_of), contents_of(n.block));
    return *n.key;
  }

  template <typename Fn>
  void ForEach(const Fn& fn) const {  // fn(NodeId), nodes and roots
    for (size_t i = 0; i < nodes_.size(); ++i) {
      if (nodes_[i].alive) fn(static_cast<NodeId>(i));
    }
  }

 private:
  struct Node {
    NodeId parent = kNoNode;
    BlockId block = kNoBlock;
    int32_t children = 0;
    int32_t pins = 0;
    int32_t reasons = 0;
    uint64_t key_of_index = 0;
    NodeId next = kNoNode;  // in its bucket of the index
    bool alive = false;
    bool found = false;           // in the index
    std::optional<BlockKey> key;  // computed when it is first asked for; a root's at once
    std::string salt;             // of a root
  };
  static size_t Index(NodeId id) { return static_cast<size_t>(id); }
  static uint64_t KeyOf(NodeId parent, uint64_t hash) {
    return (hash ^ static_cast<uint64_t>(static_cast<uint32_t>(parent)) * 0x9e3779b97f4a7c15u);
  }
  size_t Bucket(uint64_t key) const { return key & (index_.size() - 1); }
  const Node& node(NodeId id) const { return nodes_[Index(id)]; }
  void Grow(size_t children, size_t roots);
  void Enter(NodeId id);
  NodeId NewNode();
  void FreeNode(NodeId id);

  Hash hash_;
  std::vector<Node> nodes_;
  std::vector<NodeId> free_;
  size_t children_ = 0;        // that there is memory for
  std::vector<NodeId> index_;  // first nodes of buckets; a power of two of them, at least `children_`
  std::map<std::string, NodeId, std::less<>> roots_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_KV_PREFIX_TREE_H_
