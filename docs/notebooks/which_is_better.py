# %% [markdown]
# # Which is better
# %%
print(1)
