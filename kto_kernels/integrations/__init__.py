"""Drop-in replacements for functions that trainers call, in one module for each library whose interface they have.
Importing `kto_kernels` imports none of these modules. They import the other library only when a function needs it, but
for `trl`, whose import imports TRL."""
