"""One rank: weights, KV blocks, and the loop that runs steps. Holds no policy."""
