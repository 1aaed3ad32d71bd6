-- no-transaction
DROP INDEX CONCURRENTLY configurations_config_idx;
