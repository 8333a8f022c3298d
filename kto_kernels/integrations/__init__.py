"""Drop-in replacements for what trainers call, one module for each library whose interface it has. Importing
`kto_kernels` imports none of them, and they import the other library only when a function of theirs needs it."""
