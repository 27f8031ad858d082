"""The emulated network of `launch.network`: hosts in private namespaces, joined by links of limited rate."""
