"""Krylov methods: orthogonalisation, the Lanczos recurrence, and the memory that they need."""
