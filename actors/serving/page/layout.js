// Where the nodes of a tree go: a column per depth, leaves on rows of their own, parents in the middle of their
// children. Pure; rows and columns are numbers that a view scales.

// `children(node)` gives a node's children in order. Returns [{node, parent, depth, row}], parents first; `parent` is an
// index into the same list, -1 for the root.
export function tidyTree(root, children) {
  const placed = [];
  let nextRow = 0;
  const place = (node, parent, depth) => {
    const index = placed.push({ node, parent, depth, row: 0 }) - 1;
    const below = children(node).map((child) => place(child, index, depth + 1));
    placed[index].row = below.length ? (placed[below[0]].row + placed[below.at(-1)].row) / 2 : nextRow++;
    return index;
  };
  place(root, -1, 0);
  return { placed, rows: Math.max(1, nextRow), depth: Math.max(...placed.map((item) => item.depth)) };
}

// Rows for intervals such that no two of a row overlap: the lowest free one, in the order given.
export function packLanes(intervals) {
  const ends = [];
  return intervals.map(([from, to]) => {
    let lane = ends.findIndex((end) => end < from);
    if (lane < 0) lane = ends.length;
    ends[lane] = to;
    return lane;
  });
}
