"""The shop of `agentrl/WebShop-v0`: its products, customers, pages and search."""
