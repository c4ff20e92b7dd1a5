"""Pure tensor maths; no state unless the state is the maths."""
