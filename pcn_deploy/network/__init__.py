"""A network before it is a graph: what must hold of it, exact rewrites, tracing, the attention map."""
