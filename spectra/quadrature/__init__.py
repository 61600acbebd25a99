"""Small dense mathematics of Gauss quadrature: rules, brackets, copies, what is resolved for certain."""
