"""Parameters, nets and names: what a network is, as plain data and pure functions."""
