"""The shop of `agentrl/WebShop-v0`: products, goals, pages, search and rewards."""
