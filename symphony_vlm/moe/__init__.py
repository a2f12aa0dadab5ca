"""Mixture-of-experts layers whose routers listen to a graph of the experts. Depends on torch alone, not on the VLM."""
