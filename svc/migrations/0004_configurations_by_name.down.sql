-- no-transaction
DROP INDEX CONCURRENTLY configurations_name_idx;
