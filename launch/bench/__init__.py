"""`tprt bench`: measurements, with a peer beside in the same run."""
