"""How each op is computed, one package a backend. Every launcher of a stem has one signature over all backends."""
