"""One deployment over several hosts: how they find each other, and what goes on between them."""
