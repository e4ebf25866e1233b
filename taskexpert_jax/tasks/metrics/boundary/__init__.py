"""odsF, the boundary benchmark of the field, without MATLAB."""
